"""A decoder layer with random parameters in float64, to find out by experiment what its parts do.

All parameters are random, those of norms and biases, too: nothing then holds just because some are one or zero.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ria_vllm.errors import RiaError
from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.model.experts.run import set_weights
from ria_vllm.offline.model.run.layer_call import LayerCall, Left, first_tensor, replaced_forwards, tensors_of

# How far apart two outputs may be that are equal but for rounding, relative to the largest value.
TOLERANCE = 1e-9
# Stacks of experts with more weights than this hold the same random expert many times, in the memory of one.
DISTINCT_WEIGHTS = 1 << 21
SEED = 0

LOWER = (torch.float32, torch.bfloat16, torch.float16)

# How the model calls a layer, and a residual stream [1, tokens, hidden] for this call.
Batch = tuple[LayerCall, torch.Tensor]
# A module's name, and what becomes of a tensor there.
Change = tuple[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Seen:
    """One call of a module: its name, the first tensor that it got, and what it returned.

    returned: the first tensor in it; form: the length of the tuple it returned, 0 for a bare tensor.
    """

    name: str
    read: torch.Tensor
    key: tuple
    returned: torch.Tensor | None = None
    form: int = 0


class Experiment:
    """One layer with random parameters, on the CPU.

    Args:
        layer: its parameters may be on the meta device; it is left as it is.
        call: how the model calls it.
        stream: any residual stream [1, tokens, hidden] that fits the call.

    Raises:
        RiaError: the copy does not run, or not twice in the same way.
    """

    def __init__(self, layer: nn.Module, call: LayerCall, stream: torch.Tensor):
        draw = torch.Generator().manual_seed(SEED)
        self.layer = _random_copy(layer, draw)
        self._begin(call, stream, draw)
        if not self.unchanged():
            raise RiaError(f"{call.place}: with random parameters, it does not compute the same values twice.")

    def _begin(self, call: LayerCall, stream: torch.Tensor, draw: torch.Generator) -> None:
        call = call.mapped(_converted)
        # What the text makes is as random as the parameters.
        made = {slot: call[slot] for slot in sorted(call.varying, key=str) if call[slot].is_floating_point()}
        drawn = {slot: torch.randn(made[slot].shape, dtype=torch.float64, generator=draw) for slot in made}
        self.call = call.replaced(drawn)
        self.stream = torch.randn(stream.shape, dtype=torch.float64, generator=draw)
        self.left: Left = {}
        self.output = self.run(self.stream, self.left)
        if not bool(self.output.isfinite().all()):
            raise RiaError(
                f"{call.place}: with random parameters and {stream.shape[1]} tokens, it does not compute finite values."
            )

    def with_batch(self, call: LayerCall, stream: torch.Tensor) -> "Experiment":
        """The same copy of the layer, run on another batch.

        Raises:
            RiaError: it does not run.
        """
        other = copy.copy(self)
        other._begin(call, stream, torch.Generator().manual_seed(SEED))
        return other

    def run(
        self,
        stream: torch.Tensor,
        left: Left | None = None,
        parameters: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> torch.Tensor:
        """The stream after the layer.

        Args:
            left: what it leaves for later layers, and they read, is added here, even if the layer is interrupted.
            parameters: name -> what the layer has in the place of its own.
        """
        everything: Left = {}
        # Some layers write into what they read, and some calls share tensors.
        call = replace(self.call, kwargs=dict(self.call.kwargs))
        layer: Any = partial(_with_parameters, self.layer, parameters) if parameters else self.layer
        with torch.no_grad(), all_in_float64():
            try:
                return call(layer, stream.clone(), everything)
            finally:
                if left is not None:
                    left.update({entry: value for entry, value in everything.items() if entry in call.leaves})

    def unchanged(self, parameters: Mapping[str, torch.Tensor] = MappingProxyType({})) -> bool:
        """Whether the layer, with other parameters, still computes the same, and leaves the same for later layers."""
        left: Left = {}
        return self.same(self.run(self.stream, left, parameters), left)

    def same(self, output: torch.Tensor, left: Left) -> bool:
        """Whether an output is the layer's own, and so is what is left for later layers."""
        if not equal(output, self.output) or left.keys() != self.left.keys():
            return False
        pairs = (map(list, (self._tensors(left[entry]), self._tensors(own))) for entry, own in self.left.items())
        return all(len(one) == len(own) and all(map(equal, one, own)) for one, own in pairs)

    def _tensors(self, left: Any) -> Iterator[torch.Tensor]:
        return tensors_of(left, self.call.place)

    def watch(self) -> list[Seen]:
        """Every call of a module within the layer, in the order in which they begin.

        The tensors are kept, so no two of them are at the same place in memory by coincidence.
        """
        seen: list[Seen | None] = []

        def seeing(name: str, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
            place, tensor = len(seen), first_tensor(args, kwargs)
            key = None if tensor is None else key_of(tensor)  # before the module writes into it
            seen.append(None)
            output = forward(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) and output else output
            if tensor is not None and key is not None:
                is_tensor, form = isinstance(first, torch.Tensor), len(output) if isinstance(output, tuple) else 0
                seen[place] = Seen(name, tensor, key, first if is_tensor else None, form if is_tensor else 0)
            return output

        modules = [(name, module) for name, module in self.layer.named_modules() if name]
        with replaced_forwards({module: partial(seeing, name, module.forward) for name, module in modules}):
            self.run(self.stream)
        return [call for call in seen if call is not None]

    def changed(self, read: Iterable[Change] = (), returned: Iterable[Change] = ()) -> AbstractContextManager[None]:
        """Change what linears read, and what modules return: as if their columns and rows were changed, but without
        copies of these."""
        forwards: dict[nn.Module, Callable] = {}
        for changes, around in ((read, _reading), (returned, _returning)):
            for name, change in changes:
                module = self.layer.get_submodule(name)
                forwards[module] = partial(around, change, forwards.get(module, module.forward))
        return replaced_forwards(forwards)

    def disturbed(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Change what these modules return, at random."""
        draw = torch.Generator().manual_seed(SEED + 1)

        def disturb(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor * (1 + torch.rand(tensor.shape, dtype=tensor.dtype, generator=draw))

        return self.changed(returned=[(name, partial(tree_map_only, torch.Tensor, disturb)) for name in names])


def _reading(change: Callable, forward: Callable, /, X: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return forward(change(X), *args, **kwargs)


def _returning(change: Callable, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
    return change(forward(*args, **kwargs))


def _with_parameters(layer: nn.Module, parameters: Mapping[str, torch.Tensor], /, *args: Any, **kwargs: Any) -> Any:
    return functional_call(layer, dict(parameters), args, kwargs)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    if one.shape != other.shape:
        return False
    if not other.is_floating_point():
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def key_of(tensor: torch.Tensor) -> tuple:
    """The same for two tensors exactly if they are views of the same numbers with the same channels."""
    width = tensor.shape[-1] if tensor.dim() else 1
    step = tensor.stride(-1) if tensor.dim() else 1
    return tensor.data_ptr(), tensor._version, tensor.numel(), width, step


class _AllInFloat64(TorchFunctionMode):
    """Computes in float64 what transformers asks to have in a smaller dtype, such as norms and softmax."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        args = tuple(torch.float64 if _is_lower(arg) else arg for arg in args)
        kwargs = {name: torch.float64 if _is_lower(value) else value for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _is_lower(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in LOWER


@contextmanager
def all_in_float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _AllInFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


def _converted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def weights_of_copy(layer: nn.Module) -> int:
    """How many weights the copy of a layer has in memory."""
    experts = experts_modules(layer)
    sizes = {
        id(parameter): math.prod(_stored_shape(parameter, path in experts))
        for path, module in layer.named_modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }
    return sum(sizes.values())


def _random_copy(layer: nn.Module, draw: torch.Generator) -> nn.Module:
    on_meta = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in layer.parameters()}
    made = copy.deepcopy(layer, dict(on_meta)).eval()
    experts = experts_modules(made)
    known: dict[int, nn.Parameter] = {}
    for path, module in made.named_modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
        if path in experts:
            set_weights(module, None)  # else the copy's forward would read the model's own weights, not the random ones
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    random = _random(parameter, draw, path in experts)
                    known[id(parameter)] = nn.Parameter(random, requires_grad=False)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                # A number may be another one in each layer, as Gemma 4's layer_scalar is.
                is_random = buffer.is_meta or (buffer.numel() == 1 and buffer.is_floating_point())
                own = _random(buffer, draw, False) if is_random else _converted(buffer)
                module._buffers[name] = own
    return made


def _random(like: torch.Tensor, draw: torch.Generator, stacked: bool) -> torch.Tensor:
    shape = tuple(like.shape)
    if not like.is_floating_point():
        return torch.zeros(shape, dtype=like.dtype)
    if len(shape) < 2:
        return torch.empty(shape, dtype=torch.float64).uniform_(0.25, 1.25, generator=draw)
    bound = math.sqrt(3 / max(shape[-1], 1))
    own = _stored_shape(like, stacked)
    return torch.empty(own, dtype=torch.float64).uniform_(-bound, bound, generator=draw).expand(shape)


def _stored_shape(like: torch.Tensor, stacked: bool) -> tuple[int, ...]:
    shape = tuple(like.shape)
    alike = stacked and len(shape) > 1 and math.prod(shape) > DISTINCT_WEIGHTS
    return (1, *shape[1:]) if alike else shape

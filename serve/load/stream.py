"""The checkpoint's tensors on their way into vLLM's model, each with its name in the checkpoint.

Before a layer's weight loader sees a tensor, vLLM's models may rename, fuse or rearrange it by rules of their own. A
tensor that is still what the file holds, or a copy of that, has a name here. A tensor without a name was changed on the
way, and compressed tensors allow no change.
"""

import functools
import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from vllm.model_executor import model_loader

from ria_vllm.compressed_tensors.packed_forms import Translation
from ria_vllm.errors import RiaError
from ria_vllm.format.proofs import PROOF_SUFFIX
from ria_vllm.serve.load.layerwise import Reloads

# How many of the last tensors are kept to recognize copies. vLLM makes a copy as soon as it gets the tensor.
REMEMBERED = 8
# How the names of a linear's tensors end. Other tensors may be large, and their names are never asked for.
PARTS = (".compressed", ".bitmask", ".weight", ".weight_scale", ".bias")

# Scales of the key-value cache, which are stored beside a linear and belong to attention.
CACHE_SCALES = ("k_scale", "v_scale", "output_scale")

# Where vLLM reads files.
LOADERS = Path(model_loader.__file__).parent

_NAME = "ria_checkpoint_name"

Taker = Callable[[str, torch.Tensor], None]
"""Loads a tensor, whose last part of the name comes first, in place of the model."""


def set_name(tensor: torch.Tensor, name: str) -> None:
    """Say that `tensor` is what the checkpoint has under this name, perhaps with its rows in another order."""
    setattr(tensor, _NAME, name)


class WeightStream:
    """Names the tensors that `model.load_weights` is given.

    Attributes:
        active: a model is loading. A tensor that it loads and that has no name was changed on the way.
        proofs: matrix -> its proof, which somebody has sent beside the weights.
    """

    def __init__(self) -> None:
        self.active = False
        self.proofs: dict[str, torch.Tensor] = {}
        self.recent: deque[tuple[torch.Tensor, str]] = deque(maxlen=REMEMBERED)

    def attach(
        self,
        model: torch.nn.Module,
        before_reload: Callable[[bool], None],
        after_load: Callable[[], None] = lambda: None,
        loaded: bool = False,
        takers: Mapping[str, Taker | None] = MappingProxyType({}),
        translation: Translation | None = None,
        after_reload: Callable[[Sequence[str]], None] = lambda left_out: None,
        check_files: Callable[[], None] = lambda: None,
        arrivals: Mapping[str, Callable[[str], None]] = MappingProxyType({}),
        embeddings: bool = True,
        prove: Callable[[Mapping[str, torch.Tensor] | None, bool], None] = lambda sent, first: None,
    ) -> None:
        """Stand between vLLM's loaders and `model`, now and on every reload.

        Args:
            before_reload: raises a RiaError if the weights must not be loaded into this model. Its argument is whether
                vLLM reads them from the model's files.
            after_load: raises a RiaError if the model's files lack weights. It comes after the first load from them.
            loaded: the model has weights already: dummies.
            takers: linears, or whole names of tensors, that the model must not see -> who takes their tensors; None if
                nobody here needs them.
            translation: of tensors that are stored in a form that no layer takes. It comes before everything else.
            after_reload: raises a RiaError if a reload from files has left layers out, whose paths it is given.
            check_files: raises a RiaError if the model's files are not those that it was built for. It comes before the
                first tensor of the first load by one of vLLM's loaders, which then has downloaded the files, and after
                the last one, because it opens one file after the other.
            arrivals: linears -> called with the last part of the name of each of their tensors; raises a RiaError if
                the linear's layer will not take it.
            embeddings: see `Reloads`.
            prove: raises a RiaError if layers do not compute what the model's files say, once all weights are packed.
                If somebody has sent the weights, its first argument are the proofs that came with them; the second is
                whether this was the first load.
        """
        load = model.load_weights
        complete = False  # the last load was one of all files
        elsewhere = {name for name, taker in takers.items() if taker is None}

        def load_checked(weights: Iterable[tuple[str, torch.Tensor]], *args: object, **kwargs: object) -> object:
            nonlocal loaded, complete
            complete = False
            first, all_files = not loaded, are_files(weights)
            if packed and not reloads.is_on:
                raise RiaError(
                    "weights arrive outside of a reload, when all layers are packed. Load them with vLLM's "
                    "reload_weights or its weight transfer, or start the server again."
                )
            # vLLM's loaders read files lazily. A list is a piece of what a trainer sends; it comes from no file.
            from_files = not isinstance(weights, list | tuple)
            if loaded:
                before_reload(from_files)
            elif all_files:
                weights = checked(weights, check_files)
            loaded = self.active = True
            if from_files:
                weights = once(weights)
            if translation is not None:
                weights = translation.translate(weights, from_files, elsewhere)
            try:
                result = load(self.named(weights, takers, arrivals), *args, **kwargs)
            finally:
                self.active = False
                self.recent.clear()
            if first and all_files:
                check_files()
            if first and from_files:
                after_load()
            complete = all_files
            return result

        @functools.wraps(load)
        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: object, **kwargs: object) -> object:
            try:
                return load_checked(weights, *args, **kwargs)
            except BaseException:
                self.proofs.clear()
                reloads.give_up()
                raise

        def finish_reload(left_out: Sequence[str]) -> None:
            if translation is not None:
                translation.finish()
            if complete:
                after_reload(left_out)
            finish(first=False)

        def finish(first: bool) -> None:
            """Prove what has come from files, or with proofs."""
            nonlocal complete
            from_files, complete = complete, False
            sent = dict(self.proofs)
            self.proofs.clear()
            if from_files or sent:
                prove(None if from_files else sent, first)

        packed = False
        process = getattr(model, "process_weights_after_loading", None)

        def process_weights_after_loading() -> None:
            """vLLM calls this when all layers of a model are packed."""
            nonlocal packed
            packed = True
            if process is not None:
                process()
            finish(first=True)

        reloads = Reloads(model, torch.get_default_dtype(), finish_reload, embeddings, self.proofs.clear)
        model.load_weights = load_weights
        model.process_weights_after_loading = process_weights_after_loading
        model.ria_reloads = reloads

    def named(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        takers: Mapping[str, Taker | None] = MappingProxyType({}),
        arrivals: Mapping[str, Callable[[str], None]] = MappingProxyType({}),
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights, but those that `takers` take. Each has its name from the moment that it is taken.

        Raises:
            RiaError: one of `arrivals` refuses a tensor.
        """
        for name, tensor in weights:
            module, _, part = name.rpartition(".")
            if name.endswith(PROOF_SUFFIX):
                self.proofs[module] = tensor.to("cpu", copy=True)
                continue
            if (module in takers or name in takers) and part not in CACHE_SCALES:
                take = takers[name] if name in takers else takers[module]
                if take is not None:
                    take(part, tensor)
                continue
            if module in arrivals:
                arrivals[module](part)
            set_name(tensor, name)
            if name.endswith(PARTS):
                self.recent.append((tensor, name))
            yield name, tensor

    def name_of(self, tensor: torch.Tensor, wanted: Collection[str] = ()) -> str | None:
        """The checkpoint's name of a tensor, or of the one that it is a copy of; None if it is neither.

        Args:
            wanted: names to prefer if several tensors are equal.
        """
        if not hasattr(tensor, _NAME):
            names = [name for other, name in reversed(self.recent) if _is_copy(tensor, other)]
            if not names:
                return None
            # A reload asks again, when the recent tensors are gone.
            set_name(tensor, next((name for name in names if name in wanted), names[0]))
        return getattr(tensor, _NAME)


def are_files(weights: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Whether they are what a loader of vLLM reads from files, and not what somebody sends, perhaps lazily, too."""
    return inspect.isgenerator(weights) and Path(weights.gi_code.co_filename).is_relative_to(LOADERS)


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], check: Callable[[], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights; `check` is called when the first one is there."""
    done = False
    for one in weights:
        if not done:
            check()
            done = True
        yield one


def once(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights, each of which comes from one file.

    Raises:
        RiaError: vLLM has read a second tensor of the same name, which would replace the first.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise RiaError(
                f"{name} is in two of the weight files that vLLM loads. Remove the files that do not belong to the "
                "model, or get all files of one run."
            )
        seen.add(name)
        yield name, tensor


def _is_copy(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
        return False
    bits = torch.uint8 if tensor.dim() else None  # torch.equal does not take fp8, and NaN differs from itself
    return torch.equal(tensor.contiguous().view(bits), other.contiguous().view(bits)) if bits else bool(tensor == other)

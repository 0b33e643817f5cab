"""Parameters that take a pruned linear from the checkpoint, through vLLM's own weight loaders."""

import functools
from collections.abc import Callable
from inspect import getclosurevars
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from ria_vllm import sparse24
from ria_vllm.errors import RiaError
from ria_vllm.serve.folding import RowOrder
from ria_vllm.serve.stream import WeightStream
from ria_vllm.serve.weight_scheme import Storage

ShardId = str | int | tuple[int, ...] | None

BITMASK_OF_ONES_AND_TWOS = 0b00110011
"""A legal byte of a bitmask, for weights that are made up (`--load-format dummy`)."""


class ReorderedRows(torch.Tensor):
    """`tensor[rows]` that is copied no sooner, and no more of it, than vLLM's loaders ask for: of a tensor that is mapped
    from its file, the rows of other ranks are never read. What `narrow` gives is a plain tensor."""

    rows: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, rows: torch.Tensor) -> "ReorderedRows":
        """tensor: [n, ...]; rows: int64 [n], a permutation, since shape and strides stay the tensor's."""
        late = tensor.as_subclass(cls)
        late.rows = rows
        return late

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in FACTS:
                return function(*args, **kwargs)
            if function is torch.Tensor.narrow and args[1:2] == (0,) and len(args) == 4:
                late, _, start, length = args
                return late.as_subclass(torch.Tensor).index_select(0, late.rows.narrow(0, start, length))
            args, kwargs = tree_map_only(cls, cls.copied, (args, kwargs))
            return function(*args, **kwargs)

    def copied(self) -> torch.Tensor:
        """All of it."""
        return self.as_subclass(torch.Tensor).index_select(0, self.rows)


FACTS = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
}
"""What `ReorderedRows` answers without copying."""


class Arrivals:
    """Checks the tensors of one layer as they arrive, reorders their rows, and remembers what came.

    Args:
        layer: vLLM's layer.
        parts: the checkpoint's linears that it is made of, in output order.
        row_orders: for each part, how its rows are to be taken.
        outputs: into how many vLLM divides the layer's rows.
        storage: how the parts are stored.
        served: the dtype of the values in the end.
        stream: knows the names that arriving tensors have in the checkpoint.
    """

    def __init__(
        self,
        layer: LinearBase,
        parts: tuple[str, ...],
        row_orders: tuple[list[RowOrder], ...],
        outputs: int,
        storage: Storage,
        served: torch.dtype,
        stream: WeightStream,
    ):
        shards = shard_ids(layer, len(parts))
        self.names = parts
        self.parts = dict(zip(shards, parts))
        self.row_orders = dict(zip(parts, row_orders))
        self.rows = expected_rows(layer, shards)
        # Two parts for more outputs than that, as where q, k and v are one tensor and a gate is another.
        self.uneven = outputs > len(parts) > 1 and not isinstance(layer, QKVParallelLinear)
        if self.uneven and len(parts) > 2:
            raise RiaError(f"{', '.join(parts)}: which of vLLM's {outputs} outputs are whose is not known here.")
        self.input_size = layer.input_size
        self.storage = storage
        self.served = served
        self.tensors = storage.tensors(served)
        self.stream = stream
        self.outputs: tuple[ShardId, ...] = ("q", "k", "v") if isinstance(layer, QKVParallelLinear) else (None,)
        if outputs > 1 and not isinstance(layer, QKVParallelLinear):
            self.outputs = tuple(range(outputs))
        self.came: set[tuple[str, ShardId]] = set()
        self.entered = False
        # Mamba-2 with one group shares rows between ranks, and gives the `weight` of its projection a loader that does
        # so. It shall find something to put it on; what then arrives in any form goes through that loader.
        self.of_model = SimpleNamespace()
        if type(layer) is ColumnParallelLinear and layer.tp_size > 1 and not storage.dense:
            layer.weight = self.of_model

    def reorders(self) -> bool:
        return any(self.row_orders.values())

    def loader_of_model(self) -> Callable[..., Any] | None:
        """The weight loader that the layer's model brought, if it did."""
        return getattr(self.of_model, "weight_loader", None)

    def covered(self, shard: ShardId) -> list[str]:
        """The parts that a tensor brings which vLLM loads as `shard`."""
        if shard is None or len(self.names) == 1:
            return list(self.names)
        ids = shard if isinstance(shard, tuple) else (shard,)
        if self.uneven:
            return [self.names[0 if ids[0] == 0 else -1]]
        if unknown := [i for i in ids if i not in self.parts]:
            raise RiaError(f"{', '.join(self.names)}: vLLM loads an output {unknown[0]!r} of it, which is not known here.")
        return [self.parts[i] for i in ids]

    def outputs_of(self, shard: ShardId) -> tuple[ShardId, ...]:
        """The layer's outputs that a tensor brings which vLLM loads as `shard`."""
        if shard is None or len(self.outputs) == 1:
            return self.outputs
        return shard if isinstance(shard, tuple) else (shard,)

    def accept(self, kind: str, tensor: torch.Tensor, shard: ShardId) -> torch.Tensor:
        """`tensor` as the layer wants it, before any sharding; reordered rows as a `ReorderedRows`.

        Raises:
            RiaError: dtype or shape are not those of this linear; it is another linear's, or not as the file has it.
        """
        parts = self.covered(shard)
        name = "+".join(parts)
        if not self.entered:
            self._check_name(kind, parts, tensor)
        if kind in self.tensors or kind == "weight_scale":
            self._check(kind, name, tensor, shard)
            self.came.update((kind, output) for output in self.outputs_of(shard))
        # vLLM cuts a bias that comes whole into outputs, which come through here once more.
        whole = len(parts) == 1 and (shard is None or len(self.names) > 1)
        orders = self.row_orders[parts[0]] if whole else []
        if not orders:
            return tensor
        if not tensor.dim():
            raise RiaError(f"{name}.{kind}: one number, expected one a row. The checkpoint is damaged; get it again.")
        rows = torch.arange(tensor.shape[0], device=tensor.device)
        for order in orders:
            try:
                rows = order.take(rows)
            except ValueError as error:
                raise RiaError(f"{name}.{kind}: its fold does not fit: {error}. The checkpoint is damaged.") from None
        return ReorderedRows.of(tensor, rows)

    def _check_name(self, kind: str, parts: list[str], tensor: torch.Tensor) -> None:
        wanted = [f"{part}.{kind}" for part in parts]
        found = self.stream.name_of(tensor, wanted)
        if found is None and self.stream.active and self.stream.strict:
            raise RiaError(
                f"{'+'.join(parts)}.{kind}: vLLM changes it before its layer loads it, in a way that only dense weights "
                "allow. `ria-vllm export` makes a dense folder."
            )
        if found is not None and found not in wanted:
            raise RiaError(
                f"vLLM loads {found} where {'+'.join(parts)} belongs. `ria-vllm export` makes a dense folder."
            )

    def _check(self, kind: str, name: str, tensor: torch.Tensor, shard: ShardId) -> None:
        rows = self.rows.get(shard, tensor.shape[0] if tensor.dim() else 0)
        if (loader := self.loader_of_model()) is not None:
            spec = getclosurevars(loader).nonlocals.get("shard_spec")
            rows = tensor.shape[:1].numel() if spec is None else sum(size - repeated for size, repeated, _ in spec)
        if kind == "weight_scale":
            dtypes = sparse24.VALUE_DTYPES
            shape = (rows, 1) if self.storage.scales == "channel" else (1,) if tensor.dim() else ()
        else:
            channels, _, dtypes = self.tensors[kind]
            shape = (rows, self.input_size // channels)
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            raise RiaError(
                f"{name}.{kind} is {tensor.dtype} {tuple(tensor.shape)}, but the model needs {shape}. "
                "The file is damaged, or config.json belongs to another model; get both again."
            )

    def missing(self, loaded: dict[str, torch.Tensor]) -> str | None:
        """The first tensor that did not come, or None. `loaded`: the layer's parameters by kind."""
        kinds = [*self.tensors, *(["weight_scale"] if self.storage.quantized else [])]
        if self.loader_of_model() is not None and "weight_scale" in loaded and bool(loaded["weight_scale"].all()):
            kinds.remove("weight_scale")  # it came by that loader alone
        wanted = ((kind, output) for output in self.outputs for kind in kinds if (kind, output) not in self.came)
        return next(("+".join(self.covered(output)) + f".{kind}" for kind, output in wanted), None)

    def wrap(self, kind: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """`loader` behind `accept`. A plain function under the loader's name: vLLM inspects both when it reloads."""

        @functools.wraps(loader)
        def load(param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None) -> None:
            loaded_weight = self.accept(kind, loaded_weight, loaded_shard_id)
            outermost, self.entered = not self.entered, True  # vLLM's loaders call each other with pieces
            try:
                if loaded_shard_id is None:
                    (self.loader_of_model() or loader)(param, loaded_weight)
                else:
                    loader(param, loaded_weight, loaded_shard_id)
            finally:
                self.entered = not outermost

        load.ria_wrapped = loader
        return load


def unwrapped(loader: Callable[..., Any]) -> Callable[..., Any]:
    """What `Arrivals.wrap` was given, or `loader` if it did not come from there."""
    return getattr(loader, "ria_wrapped", loader)


def shard_ids(layer: LinearBase, count: int) -> tuple[ShardId, ...]:
    """The ids by which vLLM's loaders tell the `count` parts of `layer` apart."""
    if count == 1:
        return (None,)
    return ("q", "k", "v") if isinstance(layer, QKVParallelLinear) and count == 3 else tuple(range(count))


def expected_rows(layer: LinearBase, shards: tuple[ShardId, ...]) -> dict[ShardId, int]:
    """Rows of each part before sharding, where the layer is of a kind that says so."""
    if type(layer) is QKVParallelLinear:
        q = layer.total_num_heads * layer.head_size
        k = layer.total_num_kv_heads * layer.head_size
        v = layer.total_num_kv_heads * layer.v_head_size
        return {"q": q, "k": k, "v": v, None: q + k + v}
    if type(layer) is MergedColumnParallelLinear:
        return {None: sum(layer.output_sizes), **dict(enumerate(layer.output_sizes))}
    if type(layer) in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear):
        return {None: layer.output_size}
    return {}


# `shape` repeats what the bitmask says. `input_permutation` is read beforehand, but vLLM streams every safetensors file
# of a folder without an index. Activations keep their precision or get a scale a token as they come, so a scale from
# the checkpoint is not needed; zero points are zero.
# They stay on the layer: a reload streams them again, some after the layer is complete.
SOAKED = {
    "shape": (2, torch.int64),
    "input_permutation": (1, torch.int32),
    "input_scale": (1, torch.float32),
    "weight_zero_point": (1, torch.int8),
    "input_zero_point": (1, torch.int8),
}


def create_parameters(
    layer: LinearBase, arrivals: Arrivals, sizes: list[int], columns: int, loader: Callable[..., Any]
) -> None:
    """Give `layer` the parameters of its storage, sum(sizes) rows for `columns` channels, and some that only soak up.

    Producers get their bias reordered too: it is created later, with whatever `layer.weight_loader` then is.
    """
    for kind, (channels, dtype, _) in arrivals.tensors.items():
        parameter = ModelWeightParameter(
            data=torch.zeros(sum(sizes), columns // channels, dtype=dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=arrivals.wrap(kind, loader),
        )
        layer.register_parameter(kind, parameter)
    if arrivals.storage.quantized:
        wrapped = arrivals.wrap("weight_scale", loader)
        if arrivals.storage.scales == "channel":
            scale = ChannelQuantScaleParameter(data=torch.zeros(sum(sizes), 1), output_dim=0, weight_loader=wrapped)
        else:
            scale = PerTensorScaleParameter(data=torch.zeros(len(sizes)), weight_loader=wrapped)
        layer.register_parameter("weight_scale", scale)
    for kind, (size, dtype) in SOAKED.items():
        parameter = Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
        parameter.weight_loader = ignore_tensor
        parameter.weight_loader_numel = 0  # nothing that a reload has to wait for
        layer.register_parameter(kind, parameter)
    if arrivals.reorders():
        layer.weight_loader = arrivals.wrap("bias", layer.weight_loader)


def ignore_tensor(param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None) -> None:
    """A weight loader for tensors that serving does not need."""


def take_parameters(layer: LinearBase) -> dict[str, torch.Tensor]:
    """What was loaded, removed from the layer; empty if it was taken before, whatever is served under the same name."""
    taken = {}
    if getattr(layer, "weight", None) is layer.ria_arrivals.of_model:
        del layer.weight
    for kind in (*layer.ria_arrivals.tensors, "weight_scale"):
        if isinstance(getattr(layer, kind, None), BasevLLMParameter):
            taken[kind] = getattr(layer, kind).data
            delattr(layer, kind)
    return taken

"""What vLLM's shard ids mean for a layer that is made of one or more linears of the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ria_vllm.errors import RiaError

ShardId = str | int | tuple[int, ...] | None


@dataclass(frozen=True)
class ShardMap:
    """Which linears and outputs of a layer a tensor covers, by the shard id under which vLLM loads it.

    Attributes:
        linears: the checkpoint's linears that the layer is made of, in output order.
        shard_ids: vLLM's id of each of them.
        outputs: the ids of the outputs into which vLLM divides the layer's rows.
        rows: shard id -> rows before tensor-parallel sharding, for the layer classes that tell.
        uneven: two linears make more than two outputs. Qwen3.5 stores q, k and v as one linear and the gate as another,
            for a layer of four outputs.
    """

    linears: tuple[str, ...]
    shard_ids: tuple[ShardId, ...]
    outputs: tuple[ShardId, ...]
    rows: Mapping[ShardId, int]
    uneven: bool

    @classmethod
    def of(cls, layer: LinearBase, linears: tuple[str, ...], num_outputs: int) -> "ShardMap":
        """The map of vLLM's `layer`, whose rows vLLM divides into `num_outputs`.

        Raises:
            RiaError: more than two linears for even more outputs.
        """
        is_qkv = isinstance(layer, QKVParallelLinear)
        uneven = num_outputs > len(linears) > 1 and not is_qkv
        if uneven and len(linears) > 2:
            raise RiaError(
                f"{', '.join(linears)}: vLLM divides their layer into {num_outputs} outputs, and ria-vllm does not "
                "know which belong to which linear."
            )
        shard_ids: tuple[ShardId, ...] = (None,)
        if len(linears) > 1:
            shard_ids = ("q", "k", "v") if is_qkv and len(linears) == 3 else tuple(range(len(linears)))
        if uneven:
            shard_ids = (tuple(range(num_outputs - 1)), num_outputs - 1)
        outputs: tuple[ShardId, ...] = ("q", "k", "v") if is_qkv else (None,)
        if num_outputs > 1 and not is_qkv:
            outputs = tuple(range(num_outputs))
        return cls(linears, shard_ids, outputs, _rows(layer), uneven)

    def linears_of(self, shard: ShardId) -> tuple[str, ...]:
        """The linears that `shard` covers, in output order.

        Raises:
            RiaError: it is not known which of the linears has this shard id.
        """
        if shard is None or len(self.linears) == 1:
            return self.linears
        ids = shard if isinstance(shard, tuple) else (shard,)
        if self.uneven:
            return (self.linears[0 if ids[0] == 0 else -1],)
        names = dict(zip(self.shard_ids, self.linears))
        if unknown := [i for i in ids if i not in names]:
            raise RiaError(
                f"{', '.join(self.linears)}: vLLM loads one of them as shard {unknown[0]!r}, and ria-vllm does not "
                "know which."
            )
        return tuple(names[i] for i in ids)

    def outputs_of(self, shard: ShardId) -> tuple[ShardId, ...]:
        """The outputs that `shard` covers."""
        if shard is None or len(self.outputs) == 1:
            return self.outputs
        return shard if isinstance(shard, tuple) else (shard,)


def _rows(layer: LinearBase) -> dict[ShardId, int]:
    # A subclass may count its rows in another way.
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

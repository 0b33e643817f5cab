"""The contents of a compressed folder in plain numbers, for `ria-vllm inspect`."""

from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.int8_rows import INTEGERS
from ria_vllm.format.stacks import layers_of_experts
from ria_vllm.format.weight_format import name_of
from ria_vllm.progress import Monitor
from ria_vllm.report import report_linears, report_number


@dataclass(frozen=True)
class LinearEntry:
    """One pruned linear. `bytes` counts all its tensors and the permutation; `sparsity` counts real zeros.

    experts: the module of the routed experts that it belongs to; None: to none.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    bytes: int
    dense_bytes: int
    sparsity: float
    permutation: str  # none, folded (into the rows of its producers) or gathered (by its own kernel)
    retained_before: float | None
    retained_after: float | None
    experts: str | None = None


@dataclass(frozen=True)
class Totals:
    """Bytes of the weights. `dense_bytes`: of the dense model, with the head in its own dtype, too."""

    linears: int
    linear_bytes: int
    linear_dense_bytes: int
    other_bytes: int
    bytes: int
    dense_bytes: int
    ratio: float
    linear_ratio: float
    sparsity: float


@dataclass(frozen=True)
class Values:
    """How the pruned linears' values are stored.

    scheme: W8A8, say; BF16: the model's own dtype.
    pattern: 2:4, say.
    format: its name, as kernels call it; a dtype if they are plain floating point.
    group_size: stored columns of a row that share a scale; None: a scale belongs to a whole row, or there is none.
    bits_per_weight: of the dense matrix; all tensors are counted, permutations, too.
    inputs: the dtype to which the linears round each token that they read; None: they do not.
    """

    scheme: str
    pattern: str
    format: str
    group_size: int | None
    bits_per_weight: float
    inputs: str | None


@dataclass(frozen=True)
class Inventory:
    folder: str
    values: Values
    linears: list[LinearEntry]
    dense_linears: list[str]
    totals: Totals
    recipe: dict[str, Any]


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts layer 9 before layer 10."""
    parts = name.split(".")
    return [(int(p), "") if p.isascii() and p.isdigit() and len(p) < 20 else (0, p) for p in parts]


def take_inventory(reader: Reader, monitor: Monitor | None = None) -> Inventory:
    """Read every tensor once, one linear at a time.

    Raises:
        RiaError: a linear is damaged.
    """
    monitor = monitor or Monitor(shown=False)
    reported, schema = report_linears(reader.report()), reader.schema
    sparse = set(reader.sparse_names)
    folded = {name for name, _, _ in reader.schema.active_folds(reader.permuted_names, sparse)}
    permuted = set(reader.permuted_names)
    experts = {
        layer.linear(kind, expert): layer.name
        for layer in layers_of_experts(reader.schema, sparse)
        for expert in range(min(layer.num_experts, len(sparse)))  # config.json may claim any number
        for kind in layer.patterns
    }
    entries, zeros = [], 0
    names = sorted(reader.sparse_names, key=natural_order)
    for name in monitor.steps(names, "reading pruned linears", len(names)):
        linear = reader.linear(name)
        rows, columns = linear.shape
        stored = (*linear.parts.values(), linear.input_permutation)
        own_zeros = rows * columns - int(linear.format.values(linear.parts, torch.float32).count_nonzero())
        zeros += own_zeros
        kind = "none" if name not in permuted else "folded" if name in folded else "gathered"
        entries.append(
            LinearEntry(
                name=name,
                shape=(rows, columns),
                dtype=name_of(linear.dtype) if linear.format == FLOAT else linear.format.name,
                bytes=sum(t.nbytes for t in stored if t is not None) + 2 * 8,  # and the shape, two int64
                dense_bytes=rows * columns * linear.dtype.itemsize,
                sparsity=own_zeros / (rows * columns),
                permutation=kind,
                retained_before=report_number(reported.get(name), "retained_before"),
                retained_after=report_number(reported.get(name), "retained_after"),
                experts=experts.get(name),
            )
        )
    dense = reader.dense_names
    other = sum(reader.tensor(name).nbytes for name in monitor.steps(dense, "reading other tensors", len(dense)))
    itemsize = getattr(torch, schema.weights.dtype).itemsize if schema.weights else 0
    saved = sum(
        parts[INTEGERS].numel() * itemsize - sum(tensor.nbytes for tensor in parts.values())
        for parts in map(reader.int8, reader.int8_names)
    )
    linear_bytes = sum(e.bytes for e in entries)
    linear_dense = sum(e.dense_bytes for e in entries)
    totals = Totals(
        linears=len(entries),
        linear_bytes=linear_bytes,
        linear_dense_bytes=linear_dense,
        other_bytes=other,
        bytes=linear_bytes + other,
        dense_bytes=linear_dense + other + saved,
        ratio=(linear_bytes + other) / (linear_dense + other + saved),
        linear_ratio=linear_bytes / max(1, linear_dense),
        sparsity=zeros / max(1, sum(e.shape[0] * e.shape[1] for e in entries)),
    )
    values = Values(
        scheme=schema.scheme,
        pattern=str(schema.pattern),
        format=", ".join(sorted({e.dtype for e in entries})),
        group_size=schema.weight_format.group_size,
        bits_per_weight=8 * linear_bytes / max(1, sum(e.shape[0] * e.shape[1] for e in entries)),
        inputs=None if schema.input_dtype is None else name_of(schema.input_dtype),
    )
    dense_linears = sorted(schema.sparsity_config.ignore)
    return Inventory(str(reader.folder), values, entries, dense_linears, totals, schema.recipe)

"""The contents of a compressed folder in plain numbers, for `ria-vllm inspect`."""

from typing import Any

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.int8_rows import INTEGERS
from ria_vllm.format.stacks import layers_of_experts
from ria_vllm.format.weight_format import name_of
from ria_vllm.progress import Monitor
from ria_vllm.report import report_linears, report_number


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts layer 9 before layer 10."""
    parts = name.split(".")
    return [(int(p), "") if p.isascii() and p.isdigit() and len(p) < 20 else (0, p) for p in parts]


def take_inventory(reader: Reader, monitor: Monitor | None = None) -> dict[str, Any]:
    """What `inspect --json` prints. Every tensor is read once, one linear at a time.

    Of each pruned linear, `bytes` counts all its tensors and the permutation, and `sparsity` real zeros; `permutation`
    is none, folded (into the rows of its producers) or gathered (by its own kernel); `experts` is the module of the
    routed experts that it belongs to. `dense_bytes` are the dense model's, with the head in its own dtype, too. In
    `values`, `format` is as kernels call it, a dtype if they are plain floating point; `group_size` counts the stored
    columns of a row that share a scale; `inputs` is the dtype to which linears round each token that they read.

    Raises:
        RiaError: a linear is damaged.
    """
    monitor, schema, sparse = monitor or Monitor(shown=False), reader.schema, set(reader.sparse_names)
    reported, permuted = report_linears(reader.report()), set(reader.permuted_names)
    folded = {name for name, _, _ in schema.active_folds(reader.permuted_names, sparse)}
    experts = {
        layer.linear(kind, expert): layer.name
        for layer in layers_of_experts(schema, sparse)
        for expert in range(min(layer.num_experts, len(sparse)))  # config.json may claim any number
        for kind in layer.patterns
    }
    linears, weights, zeros = [], 0, 0
    for name in monitor.steps(sorted(sparse, key=natural_order), "reading pruned linears", len(sparse)):
        linear = reader.linear(name)
        rows, columns = linear.shape
        stored = (*linear.parts.values(), linear.input_permutation)
        own_zeros = rows * columns - int(linear.format.values(linear.parts, torch.float32).count_nonzero())
        linears.append(
            {
                "name": name,
                "shape": [rows, columns],
                "dtype": name_of(linear.dtype) if linear.format == FLOAT else linear.format.name,
                "bytes": sum(t.nbytes for t in stored if t is not None) + 2 * 8,  # and the shape, two int64
                "dense_bytes": rows * columns * linear.dtype.itemsize,
                "sparsity": own_zeros / (rows * columns),
                "permutation": "none" if name not in permuted else "folded" if name in folded else "gathered",
                "retained_before": report_number(reported.get(name), "retained_before"),
                "retained_after": report_number(reported.get(name), "retained_after"),
                "experts": experts.get(name),
            }
        )
        weights, zeros = weights + rows * columns, zeros + own_zeros
    dense = reader.dense_names
    other = sum(reader.tensor(name).nbytes for name in monitor.steps(dense, "reading other tensors", len(dense)))
    itemsize = getattr(torch, schema.weights.dtype).itemsize if schema.weights else 0
    saved = sum(
        parts[INTEGERS].numel() * itemsize - sum(tensor.nbytes for tensor in parts.values())
        for parts in map(reader.int8, reader.int8_names)
    )
    pruned_bytes, before = (sum(one[key] for one in linears) for key in ("bytes", "dense_bytes"))
    totals = {
        "linears": len(linears),
        "linear_bytes": pruned_bytes,
        "linear_dense_bytes": before,
        "other_bytes": other,
        "bytes": pruned_bytes + other,
        "dense_bytes": before + other + saved,
        "ratio": (pruned_bytes + other) / (before + other + saved),
        "linear_ratio": pruned_bytes / max(1, before),
        "sparsity": zeros / max(1, weights),
    }
    values = {
        "scheme": schema.scheme,
        "pattern": str(schema.pattern),
        "format": ", ".join(sorted({one["dtype"] for one in linears})),
        "group_size": schema.weight_format.group_size,
        "bits_per_weight": 8 * pruned_bytes / max(1, weights),
        "inputs": None if schema.input_dtype is None else name_of(schema.input_dtype),
    }
    return {
        "folder": str(reader.folder), "values": values, "linears": linears,
        "dense_linears": sorted(schema.sparsity_config.ignore), "totals": totals, "recipe": schema.recipe,
    }  # fmt: skip

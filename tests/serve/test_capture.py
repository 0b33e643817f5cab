"""What a CUDA graph can capture: no shape that depends on a value, no value read by the host, no copy between devices.

The layer is computed on tensors without values, whose device torch calls "meta".
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ria_vllm import sparse24
from ria_vllm.serve import packing
from ria_vllm.serve.kernels import reference
from ria_vllm.serve.kernels.cuda import backend as cutlass
from ria_vllm.serve.kernels.cuda import fp8
from ria_vllm.serve.kernels.torch import cusparselt, torch_cutlass
from ria_vllm.serve.linear import Sparse24LinearMethod
from ria_vllm.serve.packing import KernelCall, PackedLinear
from ria_vllm.serve.parameters import set_parameter

GPU = "meta"
BODIES = {
    torch.ops.ria.sparse24_linear.reference: reference._linear,
    torch.ops.ria.sparse24_linear.torch_cutlass: torch_cutlass._linear,
    torch.ops.ria.sparse24_linear.cusparselt: cusparselt._linear,
}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class Capture(TorchDispatchMode):
    """Refuses what a capture would refuse, also inside this package's own operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in BODIES:
            with self:
                return BODIES[function](*args, **kwargs)
        refused = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if function.overloadpacket in INDEXING:  # by masks, not by integers
            refused = {t.dtype for t in tree_leaves(args[1]) if t is not None} & {torch.bool, torch.uint8}
        assert not refused, f"{function}: the host waits for a value"
        devices = {t.device.type for t in given} | {torch.device(kwargs.get("device") or GPU).type}
        assert devices <= {GPU}, f"{function}: on {devices}"
        return function(*args, **kwargs)


def on_gpu(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device=GPU)


def stored(rows, columns, dtype=torch.bfloat16):
    return on_gpu(rows, columns // 2, dtype=dtype), on_gpu(rows, columns // 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: on_gpu(4, 4)[on_gpu(4, 4, dtype=torch.bool)],
        lambda: on_gpu(4, 4).masked_select(on_gpu(4, 4, dtype=torch.bool)),
        lambda: on_gpu(4, 4).nonzero(),
        lambda: on_gpu(1).item(),
        lambda: on_gpu(4, 4).index_put_((on_gpu(4, dtype=torch.bool),), on_gpu(1)),
        lambda: on_gpu(4).cpu(),
        lambda: torch.empty(4).to(GPU),
    ],
)
def test_the_capture_refuses(refused):
    """Otherwise the tests below would prove nothing."""
    with pytest.raises(AssertionError, match="the host waits for a value|: on {.*cpu"), Capture():
        refused()


def test_decompress():
    with Capture():
        dense = sparse24.decompress(*stored(300, 1 << 13))
    assert dense.shape == (300, 1 << 13) and dense.device.type == GPU


ROWS, COLUMNS = 2048 + 96, 96  # more rows than are decompressed at a time; columns that need padding
BACKENDS = {
    "reference": (reference, lambda rows, columns: stored(rows, columns)),
    "reference, int8": (
        reference,
        lambda rows, columns: (*stored(rows, columns, torch.int8), on_gpu(rows, dtype=torch.float32)),
    ),
    "torch_cutlass": (
        torch_cutlass,
        lambda rows, columns: (on_gpu(rows, columns // 2), on_gpu(rows, columns // 16, dtype=torch.int16)),
    ),
    "cusparselt": (cusparselt, lambda rows, columns: (on_gpu(rows, columns * 9 // 16),)),
    "cutlass, fp8": (
        cutlass,
        lambda rows, columns: (
            on_gpu(rows, columns // 2, dtype=fp8.DTYPE),
            on_gpu(rows * columns // 8, dtype=torch.uint8),
            on_gpu(rows, dtype=torch.float32),
        ),
    ),
}


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_layer(monkeypatch, name, gathered):
    """With padding, a permutation, two kernel calls, a bias and, if `gathered`, the channels of all ranks."""
    backend, packed = BACKENDS[name]
    monkeypatch.setattr(packing, "tensor_model_parallel_all_gather", lambda x: torch.cat([x, x], -1))
    layer, calls = torch.nn.Module(), []
    for start, rows in ((0, ROWS), (ROWS, 64)):
        tensors = packed(rows, COLUMNS + 32)
        names = tuple(f"packed_{start}_{i}" for i in range(len(tensors)))
        for kind, tensor in zip(names, tensors):
            set_parameter(layer, kind, tensor)
        set_parameter(layer, f"order_{start}", on_gpu(COLUMNS + 32, dtype=torch.int32))
        calls.append(KernelCall(name, backend.apply, names, f"order_{start}", start, rows))
    set_parameter(layer, "channels", on_gpu(COLUMNS, dtype=torch.int32))
    layer.ria_packed = PackedLinear(tuple(calls), "channels" if gathered else None, 32)
    x, bias = on_gpu(2, 9, COLUMNS), on_gpu(ROWS + 64)
    with Capture():
        y = Sparse24LinearMethod("fc", (), None, None).apply(layer, x, bias)
    assert y.shape == (2, 9, ROWS + 64) and y.dtype == x.dtype

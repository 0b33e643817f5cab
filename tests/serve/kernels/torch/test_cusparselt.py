"""cuSPARSELt's kernel as far as a machine without a GPU can see it."""

import pytest
import torch
from packed_layers import pack, random_parts

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, INT8, INTEGERS
from ria_vllm.serve.kernels import int8_inputs
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.torch import cusparselt
from ria_vllm.serve.kernels.torch.cusparselt import CusparseltKernel

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, dtype, sizes, reason",
    [
        ((8, 0), torch.bfloat16, (24, 64), "out-features 24 are not a multiple of 16"),
        ((8, 0), torch.float32, (64, 64), "dtype float32"),
        ((7, 5), torch.bfloat16, (64, 64), "compute capability 7.5"),
        ((8, 6), torch.float16, (992, 448), None),
    ],
)
def test_what_it_serves(monkeypatch, capability, dtype, sizes, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    found = CusparseltKernel.is_supported(GPU)
    found = found or CusparseltKernel.can_implement(LinearLayerConfig(GPU, dtype, FLOAT, *sizes))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "format, input_dtype, sizes, reason",
    [
        (INT8, torch.int8, (48, 64), "out-features 48 are not a multiple of 32"),
        (INT8, torch.int8, (64, 480), None),
        (INT8, None, (64, 64), "no int8 weights with unrounded inputs"),
        (INTEGERS[4, None], torch.int8, (64, 64), "no int4 weights with int8 inputs"),
    ],
)
def test_which_integers_it_serves(format, input_dtype, sizes, reason):
    config = LinearLayerConfig(GPU, torch.bfloat16, format, *sizes, input_dtype)
    assert CusparseltKernel.can_implement(config) == reason


@pytest.fixture
def on_cpu():
    """The operator takes tensors on the CPU while the test runs."""
    registered = torch.library.Library("ria", "IMPL")
    registered.impl("sparse24_linear.cusparselt", cusparselt._linear, "CPU")
    yield
    registered._destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading, bias", [((3,), True), ((2, 16), False), ((0,), True)])
def test_integers_are_scaled_after_the_library_has_added_them(on_cpu, monkeypatch, dtype, leading, bias):
    """Bit for bit as the definition says, if the library's sums are exact; it is played by one that is as strict."""

    def dense_mm(weight, columns, bias=None, out_dtype=None, transpose_result=False):
        assert columns.shape[1] % 16 == 0 and columns.t().is_contiguous() and transpose_result
        assert weight.dtype == columns.dtype == torch.int8 and out_dtype == torch.int32 and bias is None
        return torch.nn.functional.linear(columns.t().long(), weight.long()).to(out_dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", dense_mm)
    draw = torch.Generator().manual_seed(0)
    parts, _ = random_parts(96, 128, INT8, dtype)
    x, p = torch.randn(*leading, 128, generator=draw).to(dtype), torch.randperm(128, generator=draw).int()
    b = torch.randn(97, generator=draw).to(dtype)[1:] if bias else None
    y = pack(CusparseltKernel, parts, INT8, dtype, torch.int8)(x, p, b)
    assert torch.equal(y, int8_inputs.linear(x[..., p.long()], INT8, parts, b).to(dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(2, 8), (1, 17), (0,)])
def test_tokens_are_padded_to_what_the_library_takes(monkeypatch, leading, bias):
    """Any number of tokens comes out as the dense product; the library is played by a dense one that is as strict.

    The bias is a slice, whose address the library would not take.
    """

    def dense_mm(weight, columns, bias=None, out_dtype=None, transpose_result=False):
        assert out_dtype is None and columns.shape[1] % 8 == 0 and columns.t().is_contiguous() and transpose_result
        assert all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in (weight, columns, bias))
        return torch.nn.functional.linear(columns.t(), weight, bias)

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", dense_mm)
    draw = torch.Generator().manual_seed(0)
    compressed, bitmask = sparse24.compress(torch.randn(48, 64, generator=draw))
    x, b = torch.randn(*leading, 64, generator=draw), torch.randn(49, generator=draw)[1:] if bias else None
    config = LinearLayerConfig(x.device, x.dtype, FLOAT, 48, 64)
    packed = CusparseltKernel.pack(config, {"compressed": compressed, "bitmask": bitmask})
    y = cusparselt._linear(x, *packed, 48, b)
    expected = x.double() @ sparse24.decompress(compressed, bitmask).double().t() + (0 if b is None else b.double())
    assert y.shape == expected.shape and y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)

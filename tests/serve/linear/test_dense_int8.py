"""Dense linears in int8, by the kernels that serve them. The oracle is the formula, in float64."""

import pytest
import tiny
import torch

from ria_vllm.serve.linear.dense_int8 import dense_int8

OUT, IN = 96, 192


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products(dtype, rounds):
    rng = torch.Generator().manual_seed(1)
    integers = torch.randint(-127, 128, (OUT, IN), generator=rng, dtype=torch.int8)
    scales, bias = torch.rand(OUT, 1, generator=rng) + 0.01, torch.randn(OUT, generator=rng).to(dtype)
    layer = torch.nn.Module()
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    method = dense_int8(layer, integers, scales, dtype, rounds)
    for shape in ((1, IN), (33, IN), (2, 3, IN)):
        x = torch.randn(shape, generator=rng).to(dtype)
        read = tiny.round_tokens(x.double()) if rounds else x.double()
        want = read @ (integers.double() * scales.double()).T
        eps = torch.finfo(dtype).eps
        for got, added in ((method.apply(layer, x, None), 0), (method.apply(layer, x, layer.bias), bias.double())):
            assert got.dtype == dtype and got.shape == want.shape
            limit = max(2 * eps, 5e-5) * float(want.abs().max())
            torch.testing.assert_close(got.double(), want + added, rtol=eps, atol=limit)


def test_what_no_kernel_takes_is_left_to_vllm():
    integers, scales = torch.ones(OUT, 80, dtype=torch.int8), torch.ones(OUT, 1)
    assert dense_int8(torch.nn.Module(), integers, scales, torch.bfloat16, rounds=False) is None


@pytest.mark.parametrize(("vnni", "width", "server"), [(True, IN, "vLLM"), (False, IN, "ria::"), (False, 80, None)])
def test_vllms_kernel_is_for_processors_on_which_it_is_right(monkeypatch, vnni, width, server):
    """Without VNNI its sums saturate. Widths that no other takes are widened there."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    layer = torch.nn.Module()
    layer.bias = None
    integers, scales = torch.ones(OUT, width, dtype=torch.int8), torch.ones(OUT, 1)
    method = dense_int8(layer, integers, scales, torch.bfloat16, rounds=True)
    assert (method is None) if server is None else method.kernel_name.startswith(server)

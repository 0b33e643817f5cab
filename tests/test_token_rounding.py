"""Tokens rounded to int8 and fp8: the oracle rounds number by number, in numpy's float32."""

import numpy as np
import pytest
import torch

from ria_vllm.format.sparse24 import VALUE_DTYPES
from ria_vllm.format.token_rounding import quantize_tokens, round_tokens


def one_by_one(token: np.ndarray) -> tuple[list[int], np.float32]:
    largest = np.float32(max(abs(number) for number in token))
    if largest == 0:
        return [0] * len(token), np.float32(1)
    with np.errstate(over="ignore"):
        factor = min(np.float32(127) / largest, np.finfo(np.float32).max)
    return [int(np.rint(np.float32(number * factor))) for number in token], largest / np.float32(127)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_each_token_is_rounded_by_its_own_scale(dtype):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    x[1, 2] = 0
    x[2, 0, :4] = torch.tensor([127.0, 2.5, -3.5, 126.5])  # halves go to the even number
    x[2, 0, 4:] = 0
    x = x.to(dtype)
    integers, scales = quantize_tokens(x)
    assert integers[2, 0, :4].tolist() == [127, 2, -4, 126]
    for token, found, scale in zip(x.view(-1, 64), integers.view(-1, 64), scales.flatten(), strict=True):
        expected, its_scale = one_by_one(token.float().numpy())
        assert found.tolist() == expected and scale.item() == its_scale
    rounded = round_tokens(x)
    assert rounded.dtype == dtype and torch.equal(rounded, (integers * scales).to(dtype))
    assert not rounded[1, 2].any()


def test_many_tokens():
    """A quotient that is rounded twice moves an integer in one of eight such tokens."""
    x = torch.randn(1000, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    given, (integers, scales) = x.float().numpy(), quantize_tokens(x)
    largest = np.abs(given).max(1, keepdims=True)
    assert np.array_equal(integers.numpy(), np.rint(given * (np.float32(127) / largest)))
    assert np.array_equal(scales.numpy(), largest / np.float32(127))


def test_extremes():
    """Numbers too small for their inverse, with zeros beside them; what is not finite shows."""
    for tiny in (1e-45, 1e-38, 3.7e-37, 3.8e-37):
        token = torch.tensor([tiny, 0.0, -tiny, tiny / 3])
        integers, scale = quantize_tokens(token[None])
        expected, its_scale = one_by_one(token.numpy())
        assert integers[0].tolist() == expected and scale.item() == its_scale and expected[1] == 0
    for number in (float("nan"), float("inf")):
        assert quantize_tokens(torch.tensor([[1.0, number]]))[0].isnan().any()
    assert round_tokens(torch.empty(0, 64)).shape == (0, 64)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_fp8_is_the_nearest_of_all_its_values(dtype):
    """Four bits of exponent with a bias of 7, three of mantissa, and 448 at most, where a token's largest lands."""
    mantissas = [m / 8 for m in range(8)]
    positive = [m * 2.0**-6 for m in mantissas] + [(1 + m) * 2.0**e for e in range(-6, 9) for m in mantissas]
    values = np.array(sorted({sign * one for one in positive if one <= 448 for sign in (-1, 1)}))
    x = (torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[2] = 0
    found = round_tokens(x, torch.float8_e4m3fn)
    assert found.dtype == dtype
    for token, rounded in zip(x.double().numpy(), found, strict=True):
        scale = np.abs(token).max() / 448 or 1.0
        distances = np.abs(token[:, None] / scale - values)
        nearest = torch.from_numpy(values[distances.argmin(1)] * scale).float().to(dtype)
        ties = torch.from_numpy(np.diff(np.sort(distances, 1)[:, :2], axis=1)[:, 0] < 1e-5 * np.abs(token / scale))
        assert torch.allclose(nearest[~ties], rounded[~ties], rtol=2**-7 if dtype == torch.bfloat16 else 1e-3)
        assert ties.float().mean() < 0.2 or not token.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_gradients_pass(dtype):
    x = torch.randn(2, 8, requires_grad=True)
    (round_tokens(x, dtype) * torch.arange(8.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(8.0).expand(2, 8))

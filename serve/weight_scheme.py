"""The forms in which a checkpoint may hold a 2:4 linear, and how each becomes values and bitmask."""

from dataclasses import dataclass
from typing import Literal

import torch

from ria_vllm import sparse24

QUANTIZED_DTYPES = {("int", 8): torch.int8, ("float", 8): torch.float8_e4m3fn}


@dataclass(frozen=True)
class Storage:
    """How one linear is stored.

    Attributes:
        dense: as a plain `weight` [out, in] with zeros, instead of `compressed` and `bitmask`.
        quantized: dtype of the values, None where they are plain floating point.
        scales: `weight_scale` is one number or a column of them, where quantized.
        activations: dtype that the checkpoint wants its inputs rounded to before the product, None for none.
    """

    dense: bool = False
    quantized: torch.dtype | None = None
    scales: Literal["tensor", "channel"] = "tensor"
    activations: torch.dtype | None = None

    @property
    def kept(self) -> bool:
        """Whether a kernel may take the values as they are: int8 meets unrounded inputs, fp8 meets fp8 ones, so fp8
        weights of a checkpoint that wants its inputs unrounded are served as floating point."""
        return self.quantized == torch.int8 or self.quantized == self.activations == torch.float8_e4m3fn

    def tensors(self, served: torch.dtype) -> dict[str, tuple[int, torch.dtype, tuple[torch.dtype, ...]]]:
        """Kind -> (input channels a column stands for, the parameter's dtype, dtypes that may arrive)."""
        values = self.quantized or served
        arrive = (self.quantized,) if self.quantized else sparse24.VALUE_DTYPES
        if self.dense:
            return {"weight": (1, values, arrive)}
        return {"compressed": (2, values, arrive), "bitmask": (8, torch.uint8, (torch.uint8,))}


def is_two_of_four(dense: torch.Tensor) -> bool:
    """Whether no group of four columns has more than two non-zeros."""
    return dense.shape[1] % 4 == 0 and bool(((dense != 0).view(dense.shape[0], -1, 4).sum(-1) <= 2).all())


def row_scales(scale: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """float32 [out], from float [out, 1] or from one number for each of the parts of `sizes` rows."""
    if scale.dim() == 1:
        return torch.repeat_interleave(scale, torch.tensor(sizes, device=scale.device)).float()
    return scale[:, 0].float()

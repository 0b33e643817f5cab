"""The forms in which a checkpoint may store a 2:4 linear, and how each becomes values, bitmask and scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

from ria_vllm import sparse24

QUANTIZED_DTYPES = {("int", 8): torch.int8, ("float", 8): torch.float8_e4m3fn}

BITMASK_OF_ONES_AND_TWOS = 0b00110011
"""A legal byte of a bitmask, for padding and for dummy weights."""


@dataclass(frozen=True)
class TensorSpec:
    """One of the tensors that store a linear [out, in].

    Attributes:
        dtype: of the parameter that the tensor is loaded into.
        accepted: the dtypes that the checkpoint may hold.
        channels: input channels to a column. None: there is one column for all of them.
        per_tensor: the tensor is one number for the whole linear; it has neither rows nor columns.
    """

    dtype: torch.dtype
    accepted: tuple[torch.dtype, ...]
    channels: int | None = None
    per_tensor: bool = False

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        if self.per_tensor:
            return (1,)
        return (out_features, 1 if self.channels is None else in_features // self.channels)


@dataclass(frozen=True)
class Weights:
    """The weights of a layer on this rank.

    Attributes:
        values: [out, in/2] in the dtype that is served, or int8 or fp8 with scales; [out, in] without a bitmask.
        bitmask: uint8 [out, in/8]. None: the layer is not 2:4.
        scales: float32 [out], what to multiply each row of quantized values by.
        padding: how many of the input channels are zeros at the end that were not stored.
    """

    values: torch.Tensor
    bitmask: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    padding: int = 0

    @property
    def in_features(self) -> int:
        """With the padding."""
        return self.values.shape[1] * (1 if self.bitmask is None else 2)

    def rows(self, start: int, count: int) -> "Weights":
        cut = slice(start, start + count)
        scales = None if self.scales is None else self.scales[cut]
        return Weights(self.values[cut], self.bitmask[cut], scales, self.padding)

    def dequantized(self, dtype: torch.dtype) -> "Weights":
        if self.scales is None:
            return self
        values = (self.values.float() * self.scales[:, None]).to(dtype)
        return Weights(values, self.bitmask, None, self.padding)

    def padded(self) -> "Weights":
        """2:4 weights with as many input channels as kernels want."""
        padding = -self.in_features % sparse24.IN_FEATURES_MULTIPLE
        if not padding:
            return self
        values = pad(self.values, (0, padding // 2))
        bitmask = pad(self.bitmask, (0, padding // 8), value=BITMASK_OF_ONES_AND_TWOS)
        return Weights(values, bitmask, self.scales, padding)

    def fault(self) -> str | None:
        """What is wrong with padded 2:4 weights, or None."""
        # Any eight bits are a quantized value.
        values = self.values if self.scales is None else self.values.view(torch.int8)
        return sparse24.check(values, self.bitmask)


@dataclass(frozen=True)
class WeightScheme:
    """How one linear is stored.

    Attributes:
        dense: as a plain `weight` [out, in] with zeros, instead of `compressed` and `bitmask`.
        quantized: dtype of the values; None where they are plain floating point.
        strategy: of quantized values: `weight_scale` is one number for the linear, or one for each output channel.
        activations: dtype to which the checkpoint wants the linear's input rounded; None for no rounding.
    """

    dense: bool = False
    quantized: torch.dtype | None = None
    strategy: Literal["tensor", "channel"] = "tensor"
    activations: torch.dtype | None = None

    @property
    def stays_quantized(self) -> bool:
        """Whether a kernel may take the values as they are.

        int8 weights are multiplied with inputs that are not rounded, fp8 weights with fp8 inputs. So fp8 weights are
        served as floating point where the checkpoint wants its inputs unrounded.
        """
        return self.quantized == torch.int8 or self.quantized == self.activations == torch.float8_e4m3fn

    def tensors(self, served: torch.dtype) -> dict[str, TensorSpec]:
        """The tensors of a linear, by the last part of their names; `served` is the dtype of the model in vLLM."""
        values = self.quantized or served
        accepted = (self.quantized,) if self.quantized else sparse24.VALUE_DTYPES
        if self.dense:
            found = {"weight": TensorSpec(values, accepted, 1)}
        else:
            found = {
                "compressed": TensorSpec(values, accepted, 2),
                "bitmask": TensorSpec(torch.uint8, (torch.uint8,), 8),
            }
        if self.quantized:
            found["weight_scale"] = TensorSpec(
                torch.float32, sparse24.VALUE_DTYPES, per_tensor=self.strategy == "tensor"
            )
        return found

    def weights(
        self, loaded: Mapping[str, torch.Tensor], sizes: Sequence[int], served: torch.dtype, dummy: bool = False
    ) -> Weights:
        """Turn the loaded tensors into what a kernel packs.

        Args:
            loaded: tensor by the last part of its name, of all linears of a layer together.
            sizes: rows of each output of the layer.
            served: dtype of the model in vLLM.
            dummy: nothing was loaded; the values are random, and any 2:4 pattern will do.

        Returns:
            Weights without a bitmask where the linear was stored plain and is not 2:4.

        Raises:
            ValueError: a scale that is not finite.
        """
        values = loaded["weight"] if self.dense else loaded["compressed"]
        scales = row_scales(loaded["weight_scale"], sizes) if self.quantized else None
        if scales is not None and not bool(scales.isfinite().all()):
            raise ValueError("a weight_scale is not a finite number")
        weights = Weights(values, loaded.get("bitmask"), scales)
        if self.dense and not dummy and not is_two_of_four(values):
            return weights.dequantized(served)
        if not self.stays_quantized:
            weights = weights.dequantized(served)
        return compress(weights) if self.dense else weights


def compress(weights: Weights) -> Weights:
    """Plain values [out, in] as 2:4."""
    dtype = weights.values.dtype
    # Torch cannot sort fp8; bfloat16 holds all of its numbers.
    values = weights.values.bfloat16() if dtype == torch.float8_e4m3fn else weights.values
    compressed, bitmask = sparse24.compress(values)
    return Weights(compressed.to(dtype), bitmask, weights.scales)


def is_two_of_four(dense: torch.Tensor) -> bool:
    """Whether no group of four columns has more than two non-zeros."""
    return dense.shape[1] % 4 == 0 and bool(((dense != 0).view(dense.shape[0], -1, 4).sum(-1) <= 2).all())


def row_scales(scale: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """float32 [out], from [out, 1] or from one number for each of the outputs of `sizes` rows."""
    if scale.dim() == 1:
        return torch.repeat_interleave(scale, torch.tensor(sizes, device=scale.device)).float()
    return scale[:, 0].float()

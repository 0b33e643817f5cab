"""Training through the rounding of a quantized format."""

import torch

from ria_vllm.weight_format import WeightFormat


class StraightThrough:
    """Rounds kept values to what a format can hold, by scales that stay as they are stored.

    The forward pass reads the rounded values, and the optimizer goes on with the exact ones. What lies outside the
    range of its scale is drawn back to a step beyond the last representable value, so that it can return.

    Args:
        weight_format: with scales.
        scales: as stored: [out, 1], or [out, groups].
        dtype: of the model.
    """

    def __init__(self, weight_format: WeightFormat, scales: torch.Tensor, dtype: torch.dtype):
        self.format, self.scales, self.dtype = weight_format, scales, dtype

    def __call__(self, values: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self.scales[rows]
        rounded = self.format.quantize(values, self.dtype, scales)[0].float()
        if self.format.name == "fp8":  # its steps differ in size, and its range is far from what weights reach
            return rounded, values
        step = scales.float().repeat_interleave(values.shape[1] // scales.shape[1], 1)
        gap = values - rounded
        return rounded, torch.where(gap.abs() > step, rounded + gap.clamp(-step, step), values)

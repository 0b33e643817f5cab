"""Training through the rounding of a quantized format."""

import torch

from ria_vllm.formats import IntFormat, wide_scales


class StraightThrough:
    """Rounds kept values to what a format can hold, by scales that stay as they are stored.

    The forward pass reads the rounded values, and the optimizer goes on with the exact ones. What lies outside the
    range of its scale is drawn back to a step beyond the last representable value, so that it can return.

    Args:
        scales: as stored: [out, 1], or [out, groups].
        dtype: of the model.
    """

    def __init__(self, weight_format: IntFormat, scales: torch.Tensor, dtype: torch.dtype):
        self.format, self.scales, self.dtype = weight_format, scales, dtype

    def __call__(self, values: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self.scales[rows]
        rounded = self.format.nearest(values, scales).to(self.dtype).float()
        step = wide_scales(scales, values.shape[1])
        gap = values - rounded
        return rounded, torch.where(gap.abs() > step, rounded + gap.clamp(-step, step), values)

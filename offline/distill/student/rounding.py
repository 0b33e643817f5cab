"""Training through the rounding of a quantized format."""

import torch

from ria_vllm.format.formats import RoundedFormat, wide_scales


class StraightThrough:
    """Rounds kept values to what a format can hold, by the scales as they are at that time.

    The forward pass reads the rounded values, and the optimizer goes on with the exact ones. What lies outside the
    range of its scale is drawn back to a step beyond the last representable value, so that it can return.

    Args:
        scales: as stored: [out, 1], or [out, groups].
        dtype: of the model.
    """

    def __init__(self, weight_format: RoundedFormat, scales: torch.Tensor, dtype: torch.dtype):
        self.format, self.scales, self.dtype = weight_format, scales, dtype
        self.first = scales.float()

    def scale(self, logarithms: torch.Tensor) -> None:
        """Change the scales.

        Args:
            logarithms: float32 [out, 1 or groups], of what they have changed by since the beginning.
        """
        self.scales = self.format.storable(self.first * logarithms.exp())

    def __call__(self, values: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self.scales[rows]
        rounded = self.format.nearest(values, scales).to(self.dtype).float()
        step = wide_scales(scales, values.shape[1]) * self.format.spacing
        gap = values - rounded
        return rounded, torch.where(gap.abs() > step, rounded + gap.clamp(-step, step), values)

    def of_scales(self, values: torch.Tensor, gradient: torch.Tensor, rows: slice) -> torch.Tensor:
        """The gradient of the logarithms of some rows' scales, as in learned step sizes (LSQ): [rows, 1 or groups].

        A value that is rounded to q reads q * scale, and its own part, value / scale, has a gradient of 1. So the
        scale itself moves by what rounding adds; of values out of range, by all of what they are read as.

        Args:
            values: exact, float32 [rows, in/2].
            gradient: of the rounded values, float32 [rows, in/2].
        """
        scales = self.scales[rows]
        wide = wide_scales(scales, values.shape[1])
        rounded = self.format.nearest(values, scales)
        low, high = self.format.smallest * wide, self.format.largest * wide
        added = torch.where((values < low) | (values > high), rounded, rounded - values)
        return (gradient * added).unflatten(1, (scales.shape[1], -1)).sum(-1)

"""One pruned linear, and its weight as it is stored."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ria_vllm.format import permutation
from ria_vllm.format.formats import RoundedFormat
from ria_vllm.offline.pruning.admm import ROWS_AT_ONCE
from ria_vllm.offline.pruning.rounding import nearest_scales
from ria_vllm.offline.recipe import Recipe

DENSE = "int8"  # in the records of linears that keep all weights, and are only rounded


@dataclass(frozen=True)
class Pruned:
    """One pruned linear, or one that stays dense and is rounded, with its channels in the model's own order.

    weight: [out, in] in the checkpoint's dtype, zero outside the mask.
    packed_mask: uint8, one bit per entry of the mask, row by row (all masks of a layer are in memory until it is
        written).
    p: int64 [in], the permutation of the input channels under which the mask has its pattern; None: the model's own.
    record: the report's entry.
    scale: the scales, if the weight's format has any; `weight` is rounded to what the format can hold.
    exact: [kept] in the dtype of `weight`, what it keeps, row by row, before it was rounded; None if nothing after it
        is pruned for that.
    """

    weight: torch.Tensor
    packed_mask: torch.Tensor
    p: torch.Tensor | None
    record: dict[str, Any]
    scale: torch.Tensor | None = None
    exact: torch.Tensor | None = None

    @property
    def before_rounding(self) -> "Pruned":
        """The same linear with its exact weight."""
        assert self.exact is not None
        weight = torch.zeros_like(self.weight).masked_scatter_(self.mask, self.exact)
        return replace(self, weight=weight, scale=None, exact=None)

    @property
    def is_dense(self) -> bool:
        return DENSE in self.record

    @property
    def mask(self) -> torch.Tensor:
        """bool [out, in], True = kept."""
        bits = np.unpackbits(self.packed_mask.numpy(), count=self.weight.numel(), bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).view(self.weight.shape)


def packed(mask: torch.Tensor) -> torch.Tensor:
    """bool [out, in] -> `Pruned.packed_mask`."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None, bitorder="little"))


def stored_weight(
    weight: torch.Tensor,
    p: torch.Tensor | None,
    dtype: torch.dtype,
    recipe: Recipe,
    scales: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight as it will be read back, and its scales if its format has any; on the CPU.

    Args:
        weight: [out, in], columns in the model's own order.
        p: int64 [in], the permutation under which they are stored; None: the model's own.
        dtype: of the checkpoint.
        scales: those by which it is rounded to the nearest value; None: those by which this costs least.
        importance: [in], what a squared error in a channel then costs; None: the same in all.
    """
    weight_format = recipe.weight_format
    if not isinstance(weight_format, RoundedFormat):
        return weight.to(dtype).cpu(), None
    p = None if p is None or weight_format.group_size is None else p.to(weight.device)
    back = None if p is None else permutation.invert(p)
    importance = importance if importance is None or p is None else importance[p]
    stored, found = torch.empty(weight.shape, dtype=dtype), []
    for start in range(0, len(weight), ROWS_AT_ONCE):  # so that float32 temporaries stay small beside the weight
        rows = slice(start, start + ROWS_AT_ONCE)
        part = weight[rows] if p is None else weight[rows][:, p]
        given = nearest_scales(part, weight_format, importance) if scales is None else scales[rows]
        part, given = weight_format.quantize(part, dtype, given.to(part.device))
        stored[rows] = (part if back is None else part[:, back]).cpu()
        found.append(given.cpu())
    return stored, torch.cat(found)

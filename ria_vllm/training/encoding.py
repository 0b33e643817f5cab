"""Trained weights in the format of a compressed folder, and how far they are from what it holds."""

import math
from dataclasses import replace

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear, not_finite
from ria_vllm.errors import RiaError
from ria_vllm.format import int8_rows, sparse24
from ria_vllm.format.formats import INT8
from ria_vllm.format.weight_format import WeightFormat


class Encoder:
    """Encodes the weights of one model, one at a time, and sums up what training and rounding have changed.

    Attributes:
        changed: how many linears have other weights than in the folder.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.changed = 0
        self._before, self._moved, self._trained, self._rounded = 0.0, 0.0, 0.0, 0.0  # sums of squares

    @property
    def relative_change(self) -> float:
        """||trained - before|| / ||before||, over all linears so far."""
        return math.sqrt(self._moved / self._before) if self._before else 0.0

    @property
    def rounding(self) -> float:
        """||written - trained|| / ||trained||, over all linears so far."""
        return math.sqrt(self._rounded / self._trained) if self._trained else 0.0

    def linear(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of a pruned linear.

        Args:
            weight: [out, in], any floating dtype, in the model's own order.

        Raises:
            RiaError: another shape than in the folder, a value that is not finite, or one outside the mask.
        """
        before = self.reader.linear(name)
        self._check(name, weight, before.shape)
        p = before.input_permutation
        stored = weight if p is None else weight[:, p.long()]
        mask = sparse24.mask_from_bitmask(before.parts["bitmask"])
        outside = int((stored[~mask] != 0).sum())
        if outside:
            raise RiaError(
                f"{name}: {outside} of its weights are not zero though they are pruned in {self.reader.folder}. Either "
                "they were trained without `keep_sparse`, or an adapter was merged into them, which makes them dense. "
                "Save the adapter instead (before merging: `model.save_pretrained(ADAPTER)`) and serve it beside the "
                "folder (`vllm serve OUT --enable-lora --lora-modules NAME=ADAPTER`), or prune the merged model anew."
            )
        kept, dtype = stored[mask].view(len(mask), -1), weight.dtype
        # In a wider dtype, integers times scales are not those products rounded to the folder's.
        old = before.format.values(before.parts, dtype)
        if self._untouched(before, kept):
            self._count(old, old, old)
            return before.tensors()
        parts = self._encoded(before, stored, mask)
        self._count(old, kept, before.format.values(parts, dtype))
        return replace(before, parts=parts).tensors()

    def other(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is not pruned, in the dtype that it has in the folder; the folder's own if nobody trained it.

        Raises:
            RiaError: another shape than in the folder, or a value that is not finite in that dtype.
        """
        before = self.reader.tensor(name)
        self._check(name, tensor, before.shape)
        if _rounds_to(before, tensor):
            return before
        found = tensor.to(before.dtype)
        self._check(name, found, before.shape)
        return found

    def int8(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of a head or embedding that the folder has in int8; the folder's own if nobody trained it.

        Raises:
            RiaError: see `other`.
        """
        before, rounded = self.reader.int8(name), self.reader.int8_dense(name)
        self._check(name, weight, rounded.shape)
        if not (_rounds_to(rounded, weight) or _rounds_to(int8_rows.decode(before, torch.float32), weight)):
            scales = _closer_scales(INT8, weight, torch.float32, before[int8_rows.SCALE])
            before = int8_rows.encode(weight, scales)
        return {f"{name}.{part}": tensor for part, tensor in before.items()}

    def _untouched(self, before: SparseLinear, kept: torch.Tensor) -> bool:
        """Whether kept values are those of the folder, but for rounding."""
        exact, rounded = (before.format.values(before.parts, dtype) for dtype in (torch.float32, before.dtype))
        return _rounds_to(exact, kept) or torch.equal(kept.to(before.dtype), rounded)

    def _encoded(self, before: SparseLinear, stored: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        self.changed += 1
        rounded, scales = before.format.quantize(stored, before.dtype)
        if scales is not None:
            scales = _closer_scales(before.format, stored, before.dtype, before.parts["weight_scale"])
            rounded, scales = before.format.quantize(stored, before.dtype, scales)
        self._check(before.name, rounded, before.shape)
        parts = before.format.encode(rounded, mask, scales, self.reader.schema.pattern)
        wrong = before.format.check(parts, before.shape, self.reader.schema.pattern)
        if wrong:
            raise RiaError(f"{before.name}: cannot be stored as {before.format.name}: {wrong}.")
        return parts

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != tuple(shape):
            raise RiaError(
                f"{name}: of shape {tuple(tensor.shape)} in the model, but {tuple(shape)} in {self.reader.folder}. "
                "Layers and vocabulary must stay as large as they were."
            )
        wrong = not_finite(tensor)
        if wrong:
            raise RiaError(
                f"{name}: {wrong}. Training has diverged, or its numbers are too large for the folder's dtype."
            )

    def _count(self, old: torch.Tensor, trained: torch.Tensor, written: torch.Tensor) -> None:
        old, trained, written = old.double(), trained.double(), written.double()
        self._before += float(old.square().sum())
        self._moved += float((trained - old).square().sum())
        self._trained += float(trained.square().sum())
        self._rounded += float((written - trained).square().sum())


def _rounds_to(exact: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether `tensor` is what loading makes of `exact`: rounded to its dtype, or to a narrower one before."""
    if not exact.is_floating_point():
        return torch.equal(exact.to(tensor.dtype), tensor)
    roundings = (exact.to(dtype).to(tensor.dtype) for dtype in (tensor.dtype, torch.bfloat16, torch.float16))
    return any(torch.equal(rounded, tensor) for rounded in roundings)


def _closer_scales(
    weight_format: WeightFormat, weight: torch.Tensor, dtype: torch.dtype, old: torch.Tensor
) -> torch.Tensor:
    """The old scales where they round better than those of the largest magnitudes, which calibration had not chosen."""
    rounded, scales = weight_format.quantize(weight, dtype)
    assert scales is not None
    closer = _errors(weight_format.quantize(weight, dtype, old)[0], weight, old)
    scales = scales.to(old.dtype).clamp_min(torch.finfo(old.dtype).tiny)  # float16 has fewer exponents
    fitting = _errors(rounded, weight, old)
    if getattr(weight_format, "largest_multiple", None) is not None:  # those of a row belong together
        closer, fitting = closer.sum(1, keepdim=True), fitting.sum(1, keepdim=True)
    return torch.where(closer <= fitting, old, scales)


def _errors(rounded: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The squared error under each scale, of the scales' shape."""
    return (rounded.float() - weight.float()).square().unflatten(1, (scales.shape[1], -1)).sum(-1)

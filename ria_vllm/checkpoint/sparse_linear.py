"""One pruned linear: its tensors, checked, and the dense weight that they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format import permutation
from ria_vllm.format.schema import PERMUTATION_SUFFIX, PERMUTATIONS_FILE, RiaSchema
from ria_vllm.format.weight_format import SHAPE, WeightFormat


@dataclass(frozen=True)
class SparseLinear:
    """One pruned linear, checked.

    Attributes:
        format: what its parts mean.
        parts: its stored tensors by the last part of their names, `shape` left out.
        input_permutation: integers [in], that of its columns; None: they are not permuted.
        dtype: of the dense weight.
    """

    name: str
    format: WeightFormat
    parts: Mapping[str, torch.Tensor]
    input_permutation: torch.Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        bitmask = self.parts["bitmask"]
        return bitmask.shape[0], bitmask.shape[1] * 8

    def stored(self) -> torch.Tensor:
        """Dense [out, in], columns in the stored order."""
        return self.format.decode(self.parts, self.dtype)

    def dense(self) -> torch.Tensor:
        """Dense [out, in], columns in the model's own order."""
        stored, p = self.stored(), self.input_permutation
        return stored if p is None else stored[:, permutation.invert(p).long()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that stores it, by full names; the permutation, int32, as `CheckpointWriter.finish` expects it."""
        found = {f"{self.name}.{part}": tensor for part, tensor in self.parts.items()}
        found[f"{self.name}.{SHAPE}"] = torch.tensor(self.shape, dtype=torch.int64).view(2, 1)
        if self.input_permutation is not None:
            found[f"{self.name}{PERMUTATION_SUFFIX}"] = self.input_permutation.to(torch.int32)
        return found


def checked_linear(
    name: str, parts: Mapping[str, torch.Tensor], p: torch.Tensor | None, schema: RiaSchema, where: str | Path
) -> SparseLinear:
    """A pruned linear from its tensors.

    Args:
        parts: by the last part of their names, which `schema.tensor_names` lists.
        p: the permutation of its columns; None: they are not permuted.
        where: the file or folder, for messages.

    Raises:
        RiaError: a tensor is missing, or breaks a rule of the format.
    """
    for part in schema.tensor_names:
        if part not in parts:
            raise RiaError(f"{where}: {name}.{part} is missing. Get the weight files again.")
    shape = parts[SHAPE]
    if shape.dtype != torch.int64 or shape.numel() != 2:
        raise RiaError(f"{where}: {name}.shape is not two int64 numbers. Get the file again.")
    weight_format = schema.weight_format
    wrong = weight_format.check(parts, tuple(shape.flatten().tolist()), schema.pattern)
    if wrong:
        raise RiaError(
            f"{where}: {name}: {wrong}. The file is damaged, or config.json is another model's; get both again."
        )
    wrong = None if p is None else permutation.check(p, parts["bitmask"].shape[1] * 8)
    if wrong:
        raise RiaError(f"{where}: {name}: not a permutation: {wrong}. Get {PERMUTATIONS_FILE} again.")
    stored = {part.name: parts[part.name] for part in weight_format.parts}
    dtype = getattr(torch, schema.weights.dtype) if schema.weights else stored["compressed"].dtype
    return SparseLinear(name, weight_format, stored, p, dtype)


def not_finite(tensor: torch.Tensor) -> str | None:
    """What is wrong with the values as numbers, or None."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return None
    try:
        finite = (tensor.float() if tensor.itemsize == 1 else tensor).isfinite()
    except RuntimeError:  # torch can store this dtype and nothing else
        return f"its dtype {tensor.dtype} cannot be checked"
    return None if bool(finite.all()) else "a value is NaN or infinite"

"""Rotations of attention's heads, as tensors.

R [kv heads, d, d], orthogonal, belongs to an output projection o and the value projection v whose heads it reads. The
checkpoint has the dense model's v and o rotated: the rows of v of each key-value head multiplied by that head's matrix,
and the columns of o that read this head by its transpose.
"""

import hashlib
from collections.abc import Mapping

import torch

LARGEST = 4096  # channels of a head; checking takes their cube
FAR = 1e-4  # from the identity, in R R^T; float32 is off by a hundredth of it


def check(rotations: torch.Tensor) -> str | None:
    """Why these are not rotations as they are stored; None if they are."""
    if rotations.dtype != torch.float32:
        return f"dtype {rotations.dtype}, expected float32"
    shape = tuple(rotations.shape)
    if len(shape) != 3 or shape[1] != shape[2] or not 0 < shape[1] <= LARGEST or not shape[0]:
        return f"shape {shape}, expected [key-value heads, d, d] with d up to {LARGEST}"
    for head, matrix in enumerate(rotations.double()):
        off = (matrix @ matrix.T - torch.eye(shape[1], dtype=torch.float64)).abs().max()
        if not off < FAR:  # also where it is NaN
            return f"the matrix of head {head} is not orthogonal"
    return None


def digest(rotations: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and matrices, which tells those of one run from those of another.

    Args:
        rotations: output projection's name -> its rotations, each of which has passed `check`.

    Returns:
        64 lowercase hexadecimal digits. Hashed are, for each name in sorted order, the name as UTF-8, a zero byte and
        the matrices as little-endian float32.
    """
    found = hashlib.sha256()
    for name in sorted(rotations):
        found.update(name.encode() + b"\0" + rotations[name].cpu().numpy().astype("<f4").tobytes())
    return found.hexdigest()


def rotate_rows(tensor: torch.Tensor, rotations: torch.Tensor, rows: torch.Tensor) -> None:
    """Rotate rows as those of v, in place and head by head.

    Args:
        tensor: [out] or [out, any], of any floating dtype.
        rotations: their dtype is that of the products.
        rows: int64 [kv heads * d], where the rows of the key-value heads are, head by head.
    """
    for own, matrix in zip(rows.view(len(rotations), -1), rotations, strict=True):
        tensor[own] = (matrix @ tensor[own].to(matrix.dtype)).to(tensor.dtype)


def rotate_columns(tensor: torch.Tensor, rotations: torch.Tensor) -> None:
    """Rotate columns as those of o, in place and head by head.

    Args:
        tensor: [any, heads * d], of any floating dtype.
        rotations: their dtype is that of the products. Their number divides that of the heads.
    """
    columns = tensor.split(rotations.shape[1], 1)
    for head, part in enumerate(columns):
        matrix = rotations[head * len(rotations) // len(columns)]
        part.copy_(part.to(matrix.dtype) @ matrix.T)

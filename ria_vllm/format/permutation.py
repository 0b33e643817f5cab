"""Permutations of input channels, as integer tensors.

p [in] belongs to a stored matrix whose column j holds channel p[j]. So the linear is `x[..., p] @ stored.T`, and the
matrix in the model's own order is `stored[:, invert(p)]`.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

Permutations = Mapping[str, torch.Tensor | np.ndarray]


def check(p: torch.Tensor, size: int) -> str | None:
    """Why `p` is not a permutation of 0..size-1; None if it is one."""
    if p.dtype not in (torch.int32, torch.int64):
        return f"dtype {p.dtype}, expected int32"
    if tuple(p.shape) != (size,):
        return f"shape {tuple(p.shape)}, expected {(size,)}"
    if size and (int(p.min()) < 0 or int(p.max()) >= size):
        return f"an index outside 0..{size - 1}"
    seen = torch.bincount(p.long(), minlength=size)
    if bool((seen != 1).any()):
        return f"channel {int((seen > 1).nonzero()[0])} appears more than once"
    return None


def invert(p: torch.Tensor) -> torch.Tensor:
    """q with q[p[j]] = j, dtype and device of `p`."""
    q = torch.empty_like(p)
    q[p.long()] = torch.arange(len(p), dtype=p.dtype, device=p.device)
    return q


def is_identity(p: torch.Tensor) -> bool:
    return bool((p == torch.arange(len(p), dtype=p.dtype, device=p.device)).all())


def digest(permutations: Permutations) -> str:
    """SHA-256 over names and permutations, which tells those of one run from those of another.

    Args:
        permutations: linear's name -> [in], each of which has passed `check`.

    Returns:
        64 lowercase hexadecimal digits. Hashed are, for each name in sorted order, the name as UTF-8, a zero byte and
        the permutation as little-endian int32.
    """
    found = hashlib.sha256()
    for name in sorted(permutations):
        p = permutations[name]
        values = p.cpu().numpy() if isinstance(p, torch.Tensor) else p
        found.update(name.encode() + b"\0" + values.astype("<i4").tobytes())
    return found.hexdigest()


def head_rows(p: torch.Tensor, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """The permutation of the value projection's rows that hands the output projection its input permuted by `p`.

    Attention mixes tokens, never the channels of a head, so a permutation inside each head that is the same for all
    query heads reading one key-value head can be moved from the output projection's columns to the rows of v.

    Args:
        p: [num_heads * head_dim] permutation of the output projection's input.
        num_heads, num_kv_heads: the second divides the first, as in MHA, GQA and MQA.

    Returns:
        int64 [num_kv_heads * head_dim]: row j of the reordered v is row result[j] of v.

    Raises:
        ValueError: `p` lacks this structure.
    """
    if num_heads <= 0 or num_kv_heads <= 0 or num_heads % num_kv_heads or len(p) % num_heads:
        raise ValueError(f"{num_heads} heads, {num_kv_heads} key-value heads and {len(p)} channels do not fit together")
    head_dim, group = len(p) // num_heads, num_heads // num_kv_heads
    heads = torch.arange(num_heads, device=p.device).view(-1, 1) * head_dim
    inner = p.long().view(num_heads, head_dim) - heads
    if bool(((inner < 0) | (inner >= head_dim)).any()):
        raise ValueError("it moves a channel into another head")
    inner = inner.view(num_kv_heads, group, head_dim)
    if bool((inner != inner[:, :1]).any()):
        raise ValueError("query heads that share a key-value head have different permutations")
    return (inner[:, 0] + torch.arange(num_kv_heads, device=p.device).view(-1, 1) * head_dim).reshape(-1)


def places(rows: int, start: int, end: int, blocks: int = 1) -> torch.Tensor:
    """Where rows [start, end) of each of `blocks` equal blocks are among a linear's `rows`.

    Returns:
        int64, ascending.

    Raises:
        ValueError: there are no such rows.
    """
    if rows % blocks:
        raise ValueError(f"{rows} rows do not divide into {blocks} blocks")
    block = rows // blocks
    if not 0 <= start < end <= block:
        raise ValueError(f"rows {start} to {end} of {block}")
    return (torch.arange(blocks).view(-1, 1) * block + torch.arange(start, end)).flatten()

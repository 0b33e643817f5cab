"""Proofs: what each matrix of a checkpoint makes of one fixed vector.

Whoever multiplies with the matrix W [out, in] can show that it is the checkpoint's, through the very path that it
multiplies on: it multiplies r [in], and compares with W r. A permutation, a fold, a shard, an old weight, a packed copy
or a kernel that is wrong gives other numbers.

r is made of a seed in config.json, and the same for all matrices: integers of magnitude 1 to 127, exact in all
floating-point dtypes that models have. Half of them are 127 or -127, so that the part of r that a rank multiplies has
one, too, and a token's scale to int8 rounds nothing. Where inputs are rounded to fp8, all of them are.

`proofs/products.safetensors` holds NAME.proof, float32 [out, 2], for each matrix NAME: W r, and the root of the sum of
(W_ij r_j)^2 over a row, its spread, which says how far sums may be off. W is what the checkpoint stores, decoded, with
rows and columns in the model's own order; see also `is_matrix`.

NAME.transposed.proof is that of the transposed matrix. The down projections of pruned experts have it, too: what they
read is not r but what an activation makes of it, see `ria_vllm.serve.proving.experts`.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch

from ria_vllm.switches import is_on

PROOF_SUFFIX = ".proof"
# Behind the name of a matrix that is transposed.
TRANSPOSED = ".transposed"
VARIABLE = "RIA_VLLM_PROOF"
# A computer's unit of float32 is multiplied by this and by the root of the number of terms, for the order of sums.
SUMS = 8.0
# The power of two by which r is divided before it is multiplied, so that products fit into float16.
SCALE = 128.0
# Rows of the input where a kernel is asked for the first time: it may have other ways for few tokens and for many.
TOKENS = 33
_EPS = torch.finfo(torch.float32).eps
_CHUNK = 1 << 17  # numbers in float64 at a time: they stay in a core's cache


def wanted() -> bool:
    """Whether layers are to be proved, which the variable turns off.

    Raises:
        RiaError: it has a value that means nothing.
    """
    return is_on(VARIABLE, True, "set it to 0 to serve without proofs, or leave it unset.")


def vector(size: int, seed: int, signs_only: bool = False) -> torch.Tensor:
    """r: float32 [size], integers. That of fewer channels is the beginning of that of more.

    Args:
        signs_only: all of magnitude 127.
    """
    drawn = hashlib.shake_128(f"ria-vllm proof {seed}".encode()).digest(2 * size)
    if not drawn:
        return torch.empty(0, dtype=torch.float32)  # torch makes no tensor of an empty buffer
    values, coins = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(size, 2).int().unbind(1)
    values = (values - 128 + (values >= 128).int()).clamp(-127, 127)  # never 0: that channel would not be seen
    extreme = torch.where(values < 0, -127, 127)
    return extreme.float() if signs_only else torch.where(coins < 128, extreme, values).float()


def proof(weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """float32 [out, 2] of a matrix [out, in] on any device, see above. Summed in float64, on the CPU."""
    found = torch.empty(len(weight), 2, dtype=torch.float32)
    r = r.double()
    squares = r.square()
    for start in range(0, len(weight), rows := max(1, _CHUNK // max(1, weight.shape[1]))):
        part = weight[start : start + rows].cpu().double()
        found[start : start + rows, 0] = part @ r
        found[start : start + rows, 1] = (part.square() @ squares).sqrt_()
    return found


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor `weight` of this shape has a proof: a matrix, or a convolution [out, 1, kernel] of each channel
    by itself, as the matrix [out, kernel]. One without numbers has none: beside a 0, the other size may be anything."""
    return 0 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[1] == 1))


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two proofs, float32 [out, 2], are of one matrix. They may differ by the order of sums."""
    return one.shape == other.shape and bool(((one - other).abs() <= 4 * _EPS * other.abs().sum(1, keepdim=True)).all())


def bound(proof: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """float32 [out]: how far a product may be from `proof`.

    An output in `dtype` is rounded, and so may be the weights, where the model is served in another dtype than it is
    stored in or a kernel makes plain numbers of integers: almost independently of each other, so that the spread says
    how far that goes. It goes farthest with int4 and one scale per row, where many weights are equal and rounded alike.
    float16 has few exponents: small weights are rounded as its smallest numbers. Sums in float32 depend on their order.

    Args:
        proof: float32 [out, 2].
        columns: of the whole matrix.
    """
    products, spread, unit = proof[:, 0].abs(), proof[:, 1], torch.finfo(dtype)
    smallest = unit.tiny * unit.eps * 127 * columns**0.5
    return unit.eps * (products + 2 * spread) + smallest + SUMS * _EPS * columns**0.5 * spread


def tokens_of(r: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [count, columns], what a kernel multiplies: r [columns], -r, r, ... under SCALE."""
    return _signs(count) * r / SCALE


def fault(y: torch.Tensor, proof: torch.Tensor, columns: int, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel's products, in words that follow its name; None if they are those of a proof.

    Args:
        y: [tokens, out] on the CPU, the products with `tokens_of`.
        proof: float32 [out, 2], in the order in which the rows are computed.
        columns: of the whole matrix.
        dtype: of the activations.
    """
    products = y.float() * SCALE * _signs(len(y))
    wrong = ~((products - proof[:, 0]).abs() <= bound(proof, columns, dtype)).all(0)  # also where it is NaN
    return (
        f"{int(wrong.sum())} of its {len(proof)} rows are not what the checkpoint says" if bool(wrong.any()) else None
    )


def _signs(count: int) -> torch.Tensor:
    return 1 - 2 * (torch.arange(count) % 2)[:, None]


def check(proof: torch.Tensor) -> str | None:
    """Why this is no proof as it is stored; None if it is."""
    if proof.dtype != torch.float32 or proof.dim() != 2 or proof.shape[1] != 2:
        return f"{proof.dtype} {tuple(proof.shape)}, expected torch.float32 [out, 2]"
    return None if bool(proof.isfinite().all()) else "a value is NaN or infinite"


def digest(proofs: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names in sorted order, each as UTF-8 with a zero byte behind it, and the proof's bytes."""
    found = hashlib.sha256()
    for name in sorted(proofs):
        found.update(name.encode() + b"\0" + proofs[name].contiguous().numpy().tobytes())
    return found.hexdigest()

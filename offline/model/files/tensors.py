"""Reads the headers of a dense model's files, and checks what is in their tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from ria_vllm.checkpoint.shards import tensor_entries
from ria_vllm.errors import RiaError
from ria_vllm.format.sparse24 import VALUE_DTYPES
from ria_vllm.format.weight_format import name_of

# The dtypes that a floating-point parameter may be stored in.
FLOATS = (*VALUE_DTYPES, torch.float64)

# Weights that are checked together for being finite.
FINITE_AT_ONCE = 1 << 22

# What was read of a file counts as memory of the process while the file stays open: this is a few experts' weights.
MOST_BYTES = 1 << 25


@dataclass(frozen=True)
class Header:
    """What a safetensors file's header says of a tensor. dtype: in its words, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


def check_values(file: Path, name: str, tensor: torch.Tensor, floating: bool) -> None:
    """Refuse values that are not finite.

    Args:
        file: that the tensor `name` is from.
        floating: whether the model has a floating-point parameter there.

    Raises:
        RiaError: NaN or infinite values, or another dtype where `floating`.
    """
    if floating and tensor.dtype not in FLOATS:
        raise RiaError(
            f"{file}: {name} has dtype {name_of(tensor.dtype)}, as in a quantized model. Give the "
            "original, unquantized one."
        )
    # In pieces, because checking a whole embedding at once would take 1.5 times its memory.
    pieces = tensor.flatten().split(FINITE_AT_ONCE) if tensor.dtype in FLOATS else ()
    # A sum is finite only if its terms are, and faster to find; it may overflow where they are finite.
    if not all(bool(piece.sum().isfinite()) or bool(piece.isfinite().all()) for piece in pieces):
        raise RiaError(f"{file}: {name}: NaN or infinite values in the weights. Get the model again, or repair it.")


def headers_of(path: Path) -> list[tuple[str, Header]]:
    """Each tensor of a safetensors file and its header, with the errors of `reading`."""
    with reading(path):
        try:
            entries = tensor_entries(path)
            return [(name, Header(entry["dtype"], tuple(entry["shape"]), path)) for name, entry, *_ in entries]
        except (ValueError, KeyError) as error:  # it was one when the file was opened
            raise SafetensorError(f"no safetensors header: {error!r}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a safetensors file into a RiaError; the system's error is its cause."""
    try:
        yield
    except SafetensorError as error:
        raise RiaError(f"{path}: cannot be read ({error}). Get the file again.") from None
    except OSError as error:
        raise RiaError(
            f"{path}: cannot be read ({error}). Once it can, add --resume to go on from what is finished."
        ) from error

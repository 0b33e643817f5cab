"""The packed forms in which compressed-tensors stores 2:4 integers, and their translation into ours.

A layer never sees them. Their tensors are tiled, or have several values to a word, so vLLM could not shard them by rows
and columns. `Translation` stands before vLLM's model in the stream of weights: it unpacks whole tensors, and hands on
those of `ria_vllm.format.formats`, or a plain weight with its zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ria_vllm.compressed_tensors import marlin24
from ria_vllm.errors import RiaError
from ria_vllm.format import int8_rows
from ria_vllm.format.formats import IntFormat
from ria_vllm.format.weight_format import WeightFormat

Named = tuple[str, torch.Tensor]

# Of any quantized linear. Symmetric weights have zero points of zero, if any; columns that are not reordered have
# indices in order, if any. The shape repeats what other tensors say.
DROPPED = ("weight_shape", "weight_g_idx", "weight_zero_point")
# Tensors that only a packed linear has.
UNMISTAKABLE = ("weight_packed", "scale_packed")


@dataclass(frozen=True)
class Marlin24:
    """How the weight of one linear [out, in] is stored in `marlin-24`: see `ria_vllm.compressed_tensors.marlin24`.

    Attributes:
        format: what the values are.
        takes: the tensors that store it, by the last parts of their names.
        gives: those that it becomes.
    """

    format: IntFormat
    takes = marlin24.TENSORS
    gives = ("compressed", "bitmask", "weight_scale")

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that `gives` names. A weight that is not 2:4 must not be given as if it were.

        Raises:
            ValueError: the tensors are damaged; names the one that is.
        """
        return marlin24.unpack(tensors, self.format)


@dataclass(frozen=True)
class PackQuantized:
    """`pack-quantized`: all values of a row, plus 2^(bits-1), in words of 32 bits, the first in the lowest bits.

    It becomes `weight`: int8 [out, in], or uint8 [out, in/2] as `IntFormat.pack` packs four bits.
    """

    format: IntFormat
    takes = ("weight_packed",)
    gives = ("weight",)

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Marlin24.unpack`."""
        packed = tensors["weight_packed"]
        if packed.dtype != torch.int32 or packed.dim() != 2:
            raise ValueError(f"weight_packed: {packed.dtype} {tuple(packed.shape)}, expected a matrix of torch.int32")
        stored = packed.contiguous().view(torch.uint8)
        return {"weight": stored if self.format.num_bits == 4 else (stored ^ 128).view(torch.int8)}


class Int8Rows:
    """`ria_vllm.format.int8_rows`, which becomes a plain weight where no layer takes it as it is.

    Args:
        dtype: of the weight.
    """

    takes, gives = int8_rows.TENSORS, ("weight",)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Marlin24.unpack`."""
        if reason := int8_rows.problem(tensors):
            raise ValueError(reason)
        return {"weight": int8_rows.decode(tensors, self.dtype)}


PackedForm = Marlin24 | PackQuantized | Int8Rows


@dataclass
class Translation:
    """The stream of a checkpoint's tensors, with those of quantized linears as the model's layers expect them.

    Attributes:
        form_of: how a linear is packed; None if it is not.
        format_of: what the values of a linear are; None if it is not quantized.
    """

    form_of: Callable[[str], PackedForm | None]
    format_of: Callable[[str], WeightFormat | None]

    def names(self, names: Iterable[str]) -> list[str]:
        """What the tensors called `names` will be called.

        Raises:
            RiaError: a packed linear lacks a tensor, or config.json does not say how it is packed.
        """
        found: dict[str, set[str]] = {}
        translated = []
        for name in names:
            linear, form, part = self._split(name)
            if form is not None:
                found.setdefault(linear, set()).add(part)
            elif part in UNMISTAKABLE:
                raise RiaError(
                    f"{name}: no group of config.json's quantization_config.config_groups says how this linear is "
                    "packed. config.json belongs to another model; get the files again."
                )
            elif not self._is_dropped(linear, part):
                translated.append(name)
        for linear, parts in found.items():
            form = self.form_of(linear)
            assert form is not None
            if missing := next((part for part in form.takes if part not in parts), None):
                raise _absent(linear, missing)
            translated += [f"{linear}.{part}" for part in form.gives]
        return translated

    def translate(self, weights: Iterable[Named]) -> Iterator[Named]:
        """The same weights, unpacked. A tensor that others are needed for is copied, and waits for them.

        Raises:
            RiaError: a damaged tensor, columns in another order, zero points, or a tensor that never came.
        """
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            linear, form, part = self._split(name)
            if form is not None:
                parts = waiting.pop(linear, {}) | {part: tensor}
                if len(parts) == len(form.takes):
                    yield from _unpacked(linear, form, parts)
                else:
                    waiting[linear] = parts | {part: tensor.clone()}  # its memory may be a file's or a buffer's
            elif self._is_dropped(linear, part):
                _check_dropped(name, part, tensor, self.format_of(linear))
            else:
                yield name, tensor
        for linear, parts in waiting.items():
            form = self.form_of(linear)
            assert form is not None
            raise _absent(linear, next(part for part in form.takes if part not in parts))

    def _split(self, name: str) -> tuple[str, PackedForm | None, str]:
        """Linear, how it is packed, and part; None in the middle for a tensor that is no part of a packed weight."""
        linear, _, part = name.rpartition(".")
        form = self.form_of(linear) if part in _PACKED else None
        return linear, form if form and part in form.takes else None, part

    def _is_dropped(self, linear: str, part: str) -> bool:
        return part in DROPPED and self.format_of(linear) is not None


def _unpacked(linear: str, form: PackedForm, parts: Mapping[str, torch.Tensor]) -> Iterator[Named]:
    try:
        unpacked = form.unpack(parts)
    except ValueError as error:
        raise RiaError(f"{linear}.{error}. The weight file is damaged; get it again.") from None
    for given, values in unpacked.items():
        yield f"{linear}.{given}", values


_PACKED = frozenset((*Marlin24.takes, *PackQuantized.takes, *Int8Rows.takes))


def _absent(linear: str, part: str) -> RiaError:
    return RiaError(f"{linear}.{part} is in none of the weight files. Get them again.")


def _check_dropped(name: str, part: str, tensor: torch.Tensor, weight_format: WeightFormat | None) -> None:
    if part == "weight_zero_point" and bool((tensor.float() != 0).any()):  # torch compares no fp8
        raise RiaError(f"{name}: asymmetric weights are not served. Quantize the model again with symmetric: true.")
    if part == "weight_g_idx" and not bool((tensor < 0).any()):  # as in compressed-tensors, -1 stands for none
        columns = torch.arange(tensor.numel(), device=tensor.device)
        group_size = weight_format and weight_format.group_size
        if not torch.equal(tensor.flatten().long(), columns // (group_size or max(1, len(columns)))):
            raise RiaError(
                f"{name}: groups of columns in the order of their activations are not served. Quantize the model again "
                'with actorder: "weight", or without it.'
            )

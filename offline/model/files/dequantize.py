"""Weights of models that are published quantized only, made plain numbers again, one matrix at a time.

The files hold such a weight as two tensors, its values and their scales. Nothing in them is trusted.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ria_vllm.compressed_tensors.config import CompressedTensorsConfig, is_24_checkpoint
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.files.compressed_tensors import CompressedTensors, StoredLinear
from ria_vllm.offline.model.files.tensors import Header

# What four bits mean in e2m1: a sign, two bits of exponent and one of mantissa.
_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_E2M1 = torch.tensor([*_MAGNITUDES, *(-one for one in _MAGNITUDES)])
# And what a byte means, [256, 2]: the low bits come first.
E2M1_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)
GROUP = 32  # values that share a scale in MXFP4

# Rows that are in memory in float32 at a time, where scales do not say otherwise.
STRIP = 128

# In safetensors' words.
FP8, FP8_SCALES, PLAIN = "F8_E4M3", ("F32", "BF16", "F16"), ("F64", "F32", "BF16", "F16", "I64", "I32", "BOOL")
SUFFIXES = ("_scale_inv", "_scale")
# No model of transformers has such parameters. vLLM looks for all of them.
OF_KV_CACHE = re.compile(r"(?:.*\.)?(?:[qkv]_scale|kv_scale|[kv]_cache\.scale)")

READABLE = "mxfp4, fp8 (with a scale for each tensor or block) and 2:4 ones of compressed-tensors"


@dataclass(frozen=True)
class Quantized:
    """A weight that is quantized in the files.

    values, scales: the names of its two tensors.
    shape: of the plain weight: [out, in], or that of a stack of experts.
    """

    values: str
    scales: str
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.values, self.scales


@dataclass(frozen=True)
class Mxfp4:
    """gpt-oss's experts: `NAME_blocks`, uint8 [experts, out, groups, 16], has two e2m1 values to a byte, the first one
    in the low bits; `NAME_scales`, uint8 [experts, out, groups], has powers of 2 with a bias of 127.

    The plain weight NAME is [experts, in, out], as in the dense model.
    """

    method: str = "mxfp4"
    ends: ClassVar[tuple[str, ...]] = ("_scales",)  # of the names of what scales weights
    of_activations: ClassVar[tuple[str, ...]] = ()  # what scales what these are multiplied with is called

    def find(self, headers: Mapping[str, Header]) -> dict[str, Quantized]:
        """Name of a weight -> its tensors.

        Raises:
            RiaError: one lacks the other, or has a shape or dtype that does not fit.
        """
        found = {}
        for values in (name for name in headers if name.endswith("_blocks")):
            name, header = values.removesuffix("_blocks"), headers[values]
            experts, rows, groups, half = header.shape if len(header.shape) == 4 else (0, 0, 0, 0)
            if header.dtype != "U8" or half != GROUP // 2 or 0 in header.shape:
                raise _unlike(header, values, f"U8 [experts, out, groups, {GROUP // 2}]")
            _check_scales(headers, values, f"{name}_scales", ("U8",), [(experts, rows, groups)])
            found[name] = Quantized(values, f"{name}_scales", (experts, groups * GROUP, rows))
        return found

    def is_damaged(self, scales: torch.Tensor) -> bool:
        """Whether a scale is NaN or infinite."""
        return bool((scales == 255).any())

    def dequantized(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One expert.

        Args:
            values: uint8 [out, groups, 16].
            scales: uint8 [out, groups]; 255 means NaN.

        Returns:
            [in, out] in `dtype`, contiguous.
        """
        rows, groups, _ = values.shape
        plain = torch.empty(groups * GROUP, rows, dtype=dtype)
        for start in range(0, rows, STRIP):
            strip = slice(start, start + STRIP)
            powers = scales[strip].contiguous().view(torch.float8_e8m0fnu).float()
            numbers = E2M1_PAIRS.index_select(0, values[strip].int().flatten()).view(*powers.shape, GROUP)
            plain[:, strip] = numbers.mul_(powers[..., None]).flatten(1).to(dtype).T
        return plain


@dataclass(frozen=True)
class Fp8:
    """Weights in float8_e4m3fn as NAME, and what they are multiplied by as NAME_scale_inv or NAME_scale.

    block: rows and columns that share a scale, of which the last ones may be fewer; None: a scale belongs to a whole
        matrix or, in a stack of experts, to gate and up each, as the shape of the scales says.
    """

    block: tuple[int, int] | None
    method: str = "fp8"
    ends: ClassVar[tuple[str, ...]] = ("_scale_inv", ".weight_scale")
    of_activations: ClassVar[tuple[str, ...]] = ("input_scale", "activation_scale", "output_scale")

    def find(self, headers: Mapping[str, Header]) -> dict[str, Quantized]:
        """See `Mxfp4.find`."""
        found = {}
        for name in (name for name, header in headers.items() if header.dtype == FP8):
            shape = headers[name].shape
            if len(shape) not in (2, 3) or 0 in shape:
                raise _unlike(headers[name], name, "a matrix, or a stack of experts' matrices")
            *experts, rows, columns = shape
            wanted: list[tuple[int, ...]] = [(*experts, 1, 1), (*experts,)]
            wanted += _of_halves(name, headers) if experts else [(1,)]
            if self.block is not None:
                wanted = [(*experts, -(-rows // self.block[0]), -(-columns // self.block[1]))]
            scales = next(
                (f"{name}{suffix}" for suffix in SUFFIXES if f"{name}{suffix}" in headers), name + SUFFIXES[0]
            )
            _check_scales(headers, name, scales, FP8_SCALES, wanted)
            found[name] = Quantized(name, scales, shape)
        return found

    def is_damaged(self, scales: torch.Tensor) -> bool:
        """Whether a scale is NaN or infinite."""
        return not bool(scales.isfinite().all())

    def dequantized(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One matrix, multiplied in float32.

        Args:
            values: float8_e4m3fn [out, in].
            scales: one for each block, row by row; without blocks, one, or [parts, 1] for equal parts of the rows.

        Returns:
            [out, in] in `dtype`.
        """
        rows, columns = values.shape
        if self.block is not None:
            height, width = self.block
        else:
            height, width = rows // scales.numel(), columns
        grid = scales.float().reshape(-(-rows // height), -1)
        row, column = torch.arange(rows) // height, torch.arange(columns) // width
        plain = torch.empty(rows, columns, dtype=dtype)
        for start in range(0, rows, STRIP):
            strip = slice(start, start + STRIP)
            plain[strip] = values[strip].float() * grid[row[strip]].index_select(1, column)
        return plain


Scheme = Mxfp4 | Fp8 | CompressedTensors


def scheme_of(words: Any, where: str | Path) -> Scheme | None:
    """How the weights of a model are quantized.

    Args:
        words: `quantization_config` in its config.json.
        where: the model, for errors.

    Returns:
        None if they are not.

    Raises:
        RiaError: in a way that is not read here.
    """
    if not words:
        return None
    method = words.get("quant_method", "something") if isinstance(words, dict) else "something"
    if method == "mxfp4":
        return Mxfp4()
    if method == "fp8":
        return Fp8(_block(words.get("weight_block_size"), where))
    if isinstance(words, dict) and is_24_checkpoint(words):
        try:
            return CompressedTensors(CompressedTensorsConfig.parse(words))
        except RiaError as error:
            raise RiaError(f"{where}/{error}") from None
    raise RiaError(
        f"{where}: its weights are quantized ({method}), says config.json; of such models, only {READABLE} are read. "
        "Give the original, unquantized model."
    )


Dequantized = Quantized | StoredLinear


def find_quantized(scheme: Scheme, headers: Mapping[str, Header]) -> tuple[dict[str, Dequantized], set[str]]:
    """The weights of a model that are quantized in its files.

    Args:
        headers: of all tensors in the files.

    Returns:
        (name of a weight -> its tensors, the names of tensors that a plain model has no use for).

    Raises:
        RiaError: values or scales are missing, or have another shape or dtype than they should; or another tensor has
            a dtype as in a quantized model.
    """
    found: dict[str, Dequantized] = {**scheme.find(headers)}
    parts = {part for one in found.values() for part in one.parts}
    of_cache = {name for name in headers if OF_KV_CACHE.fullmatch(name)}
    unused = _of_activations(scheme, found) & headers.keys() | of_cache - parts
    known = unused | parts
    for name, header in headers.items():
        if name in known:
            continue
        if f".{name}".endswith(scheme.ends):
            raise RiaError(
                f"{header.file}: {name} is in the files, but not the {scheme.method} weight that it scales. Get the "
                "model again."
            )
        if header.dtype not in PLAIN:
            raise _unlike(header, name, f"a plain tensor or part of an {scheme.method} weight")
    return found, unused


def _of_activations(scheme: Scheme, found: Iterable[str]) -> set[str]:
    """What may scale that which these weights are multiplied with. Such scales have the name of a linear, or that of a
    stack of experts."""
    linears = {name.rpartition(".")[0] for name in found}
    modules = linears | {linear.rpartition(".")[0] for linear in linears}
    stems = [*(f"{weight}_" for weight in found), *(f"{module}." for module in modules)]
    return {stem + leaf for stem in stems for leaf in scheme.of_activations}


def _block(words: Any, where: str | Path) -> tuple[int, int] | None:
    if words is None:
        return None
    if not isinstance(words, list) or len(words) != 2 or not all(type(size) is int and size > 0 for size in words):
        raise RiaError(
            f"{where}: config.json: in quantization_config, the size of a block is not two positive whole numbers. Get "
            "the file again."
        )
    return words[0], words[1]


def _of_halves(name: str, headers: Mapping[str, Header]) -> list[tuple[int, ...]]:
    """The shape of scales that belong to gate and up each, if a stack has gate's rows before those of up.

    A stack that is [experts, in, out] has not. What its experts' down looks like tells both apart.
    """
    base, experts, rows, columns = name.removesuffix("gate_up_proj"), *headers[name].shape
    down = headers.get(f"{base}down_proj")
    is_gate_and_up = base != name and down is not None and down.shape == (experts, columns, rows // 2) and rows % 2 == 0
    return [(experts, 2, 1)] if is_gate_and_up else []


def _check_scales(
    headers: Mapping[str, Header],
    values: str,
    scales: str,
    dtypes: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    if scales not in headers:
        raise RiaError(f"{headers[values].file}: {values} has no scales: {scales} is in no file. Get the model again.")
    if headers[scales].dtype not in dtypes or headers[scales].shape not in shapes:
        raise _unlike(headers[scales], scales, f"{' or '.join(dtypes)} {' or '.join(str([*one]) for one in shapes)}")


def _unlike(header: Header, name: str, wanted: str) -> RiaError:
    return RiaError(
        f"{header.file}: {name} is {header.dtype} {[*header.shape]}; by quantization_config in config.json, it "
        f"should be {wanted}. Get the model again, or an unquantized one."
    )

"""Weights of models that are published quantized only, made plain numbers again, one matrix at a time.

The files hold such a weight as two tensors, its values and their scales. Nothing in them is trusted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError

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
UNUSED = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")

READABLE = "mxfp4, fp8 and compressed-tensors' float-quantized"


@dataclass(frozen=True)
class Header:
    """What a safetensors file's header says of a tensor. dtype: in its words, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class Quantized:
    """A weight that is quantized in the files.

    values, scales: the names of its two tensors.
    shape: of the plain weight: [out, in], or that of a stack of experts.
    """

    values: str
    scales: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Mxfp4:
    """gpt-oss's experts: `NAME_blocks`, uint8 [experts, out, groups, 16], has two e2m1 values to a byte, the first one
    in the low bits; `NAME_scales`, uint8 [experts, out, groups], has powers of 2 with a bias of 127.

    The plain weight NAME is [experts, in, out], as in the dense model.
    """

    method: str = "mxfp4"

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
                raise _unlike(header, values, f"uint8 [experts, out, groups, {GROUP // 2}]")
            _check_scales(headers, values, f"{name}_scales", ("U8",), [(experts, rows, groups)])
            found[name] = Quantized(values, f"{name}_scales", (experts, groups * GROUP, rows))
        return found

    def unused(self, names: Iterable[str], found: Iterable[str]) -> set[str]:
        """Those of `names` that a plain model has no use for. found: the weights that are quantized."""
        return set()

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
        matrix or to each row, as the shape of the scales says.
    """

    method: str
    block: tuple[int, int] | None

    def find(self, headers: Mapping[str, Header]) -> dict[str, Quantized]:
        """See `Mxfp4.find`."""
        found = {}
        for name in (name for name, header in headers.items() if header.dtype == FP8):
            shape = headers[name].shape
            if len(shape) not in (2, 3) or 0 in shape:
                raise _unlike(headers[name], name, "a matrix, or a stack of experts' matrices")
            *experts, rows, columns = shape
            wanted: list[tuple[int, ...]] = [(*experts, rows, 1), (*experts, 1, 1), *([] if experts else [(1,), ()])]
            if self.block is not None:
                wanted = [(*experts, -(-rows // self.block[0]), -(-columns // self.block[1]))]
            scales = next(
                (f"{name}{suffix}" for suffix in SUFFIXES if f"{name}{suffix}" in headers), name + SUFFIXES[0]
            )
            _check_scales(headers, name, scales, FP8_SCALES, wanted)
            found[name] = Quantized(name, scales, shape)
        return found

    def unused(self, names: Iterable[str], found: Iterable[str]) -> set[str]:
        """See `Mxfp4.unused`. Here these are the scales of rounded inputs, and those of the KV cache."""
        linears = {name.rpartition(".")[0] for name in found}
        modules = linears | {linear.rpartition(".")[0] for linear in linears}
        pairs = ((name, name.rpartition(".")) for name in names)
        return {name for name, (module, _, leaf) in pairs if module in modules and leaf in UNUSED}

    def is_damaged(self, scales: torch.Tensor) -> bool:
        """Whether a scale is NaN or infinite."""
        return not bool(scales.isfinite().all())

    def dequantized(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One matrix, multiplied in float32.

        Args:
            values: float8_e4m3fn [out, in].
            scales: one for each block, row by row; for each row, [out, 1]; or one.

        Returns:
            [out, in] in `dtype`.
        """
        rows, columns = values.shape
        if self.block is not None:
            height, width = self.block
        else:
            height, width = (1 if scales.numel() > 1 else rows), columns
        grid = scales.float().reshape(-(-rows // height), -1)
        down, across = torch.arange(rows) // height, torch.arange(columns) // width
        plain = torch.empty(rows, columns, dtype=dtype)
        for start in range(0, rows, STRIP):
            strip = slice(start, start + STRIP)
            plain[strip] = values[strip].float() * grid[down[strip]].index_select(1, across)
        return plain


Scheme = Mxfp4 | Fp8


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
        return Fp8("fp8", _block(words.get("weight_block_size"), where))
    if method == "compressed-tensors":
        found = _float_quantized(words, where)
        if found is not None:
            return found
        method = f"{method}, {words.get('format')}"
    raise RiaError(
        f"{where}: its weights are quantized ({method}); of such models, only {READABLE} are read. Give the original, "
        "unquantized model."
    )


def is_readable(words: Any) -> bool:
    """Whether `scheme_of` knows how these weights are quantized."""
    try:
        return scheme_of(words, "") is not None
    except RiaError:
        return False


def find_quantized(scheme: Scheme, headers: Mapping[str, Header]) -> tuple[dict[str, Quantized], set[str]]:
    """The weights of a model that are quantized in its files.

    Args:
        headers: of all tensors in the files.

    Returns:
        (name of a weight -> its tensors, the names of tensors that a plain model has no use for).

    Raises:
        RiaError: values or scales are missing, or have another shape or dtype than they should; or another tensor has
            a dtype as in a quantized model.
    """
    found = scheme.find(headers)
    unused = scheme.unused(headers, found)
    known = unused.union(*((one.values, one.scales) for one in found.values()))
    for name, header in headers.items():
        if name in known:
            continue
        if name.endswith(("_scales", *SUFFIXES)):
            raise RiaError(
                f"{header.file}: {name} is in the files, but not the {scheme.method} weight that it scales. Get the "
                "model again."
            )
        if header.dtype not in PLAIN:
            raise _unlike(header, name, f"a plain tensor or part of an {scheme.method} weight")
    return found, unused


def _block(words: Any, where: str | Path) -> tuple[int, int] | None:
    if words is None:
        return None
    if not isinstance(words, list) or len(words) != 2 or not all(type(size) is int and size > 0 for size in words):
        raise RiaError(
            f"{where}: config.json: in quantization_config, the size of a block is not two positive whole numbers. Get "
            "the file again."
        )
    return words[0], words[1]


def _float_quantized(words: Mapping[str, Any], where: str | Path) -> Fp8 | None:
    """The scheme of a compressed-tensors model whose quantized linears are all fp8, and none 2:4; or None."""
    groups, sparsity = words.get("config_groups"), words.get("sparsity_config") or {"format": "dense"}
    if words.get("format") != "float-quantized" or not isinstance(groups, dict) or not isinstance(sparsity, dict):
        return None
    kinds = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    if sparsity.get("format") != "dense" or not kinds or not all(isinstance(kind, dict) for kind in kinds):
        return None
    if any((k.get("num_bits"), k.get("type"), k.get("symmetric", True)) != (8, "float", True) for k in kinds):
        return None
    if all(kind.get("strategy") in ("tensor", "channel") for kind in kinds):
        return Fp8("float-quantized", None)
    blocks = {_block(kind.get("block_structure"), where) for kind in kinds if kind.get("strategy") == "block"}
    alike = len(blocks) == 1 and None not in blocks and all(kind.get("strategy") == "block" for kind in kinds)
    return Fp8("float-quantized", blocks.pop()) if alike else None


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
        f"{header.file}: {name} is {header.dtype} {[*header.shape]}; by quantization_config in config.json, it should "
        f"be {wanted}. Get the model again."
    )

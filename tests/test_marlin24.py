"""marlin-24 is unpacked bit for bit, and nothing in it is trusted."""

import itertools
from pathlib import Path

import pytest
import torch
from compressed_tensors_writer import FOLDER, Writer, needs_writer, random_24, scales_of

from ria_vllm.compressed_tensors import marlin24
from ria_vllm.format.formats import FLOAT, INTEGERS

SHAPES = ((64, 256), (192, 384), (320, 1152))  # groups of scales are interleaved from 384 on
CASES = [
    (bits, size, rows, columns) for bits, size in itertools.product((4, 8), (None, 128)) for rows, columns in SHAPES
]


def arguments(bits, size):
    groups = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    return {"num_bits": bits, "type": "int", "symmetric": True} | groups


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    writer = Writer()
    for bits, size, rows, columns in CASES:
        weight = random_24(rows, columns, seed=bits + columns)
        args = arguments(bits, size)
        writer.add(f"{bits}-{size}-{rows}-{columns}", "marlin-24", args, weight, scales_of(weight, args))
    return writer.run(tmp_path_factory.mktemp("marlin-24"))


def test_make_gets_the_writer():
    """Under another name, the tests that need it would be skipped everywhere."""
    makefile = Path(__file__).parents[1] / "Makefile"
    assert f"OLD_WRITER := .work/{FOLDER.name}\n" in makefile.read_text()


@needs_writer
@pytest.mark.parametrize(("bits", "size", "rows", "columns"), CASES)
def test_it_is_what_compressed_tensors_wrote(written, bits, size, rows, columns):
    name, weight_format = f"{bits}-{size}-{rows}-{columns}", INTEGERS[bits, size]
    parts = marlin24.unpack({part: written[f"{name}.{part}"] for part in marlin24.TENSORS}, weight_format)
    assert parts["weight_scale"].dtype == torch.float16
    assert torch.equal(weight_format.decode(parts, torch.float16), written[f"{name}.dense"])
    assert torch.equal(weight_format.decode(parts, torch.float32), written[f"{name}.exact"])
    assert FLOAT.check(weight_format.widen(parts, torch.float16), (rows, columns)) is None
    integers = weight_format.integers(parts)
    assert integers.min() == -(2 ** (bits - 1)) or integers.max() == 2 ** (bits - 1) - 1  # all bits are in use


def tensors(bits=4, size=128, rows=64, columns=256):
    """The first two columns of each four are kept, and all values are zero."""
    zero = {4: 0x88888888, 8: 0x80808080}[bits] - 2**32
    return {
        "weight_packed": torch.full((columns // 32, rows * bits // 2), zero, dtype=torch.int32),
        "scale_packed": torch.ones(columns // size if size else 1, rows, dtype=torch.float16),
        "meta": torch.full((columns // 32, 2 * rows), 0x4444, dtype=torch.int16),
    }


def with_number(number):
    meta = tensors()["meta"]
    meta[3, 17] = number
    return {"meta": meta}


def with_scale(scale):
    scales = tensors()["scale_packed"]
    scales[1, 5] = scale
    return {"scale_packed": scales}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_number(0x4440), "meta: row .*not two positions"),  # one position twice
        (with_number(0x4414), "meta: row .*not two positions"),  # in descending order
        (with_scale(torch.inf), "scale_packed: "),
        ({"meta": torch.zeros(8, 128, dtype=torch.int32)}, "meta: torch.int32"),
        ({"meta": torch.zeros(8, 64, dtype=torch.int16)}, "meta: shape"),
        ({"weight_packed": torch.zeros(8, 128)}, "weight_packed: torch.float32"),
        ({"weight_packed": torch.zeros(8, 256, dtype=torch.int32)}, "weight_packed: shape"),
        ({"weight_packed": torch.zeros(7, 128, dtype=torch.int32)}, "weight_packed: .* tiles and groups"),
        ({"scale_packed": torch.ones(2, 32)}, "weight_packed: .* for 32 rows"),
        ({"scale_packed": torch.ones(1, 64)}, "scale_packed: shape"),
    ],
)
def test_damage_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        marlin24.unpack(tensors() | changes, INTEGERS[4, 128])

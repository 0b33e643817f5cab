"""Packed tensors on their way through the stream of weights."""

import pytest
import torch
from compressed_tensors_writer import Writer, needs_writer, random_24, scales_of
from test_marlin24 import arguments, tensors

from ria_vllm.compressed_tensors.packed_forms import Marlin24, PackQuantized, Translation
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FP8, INTEGERS
from ria_vllm.format.weight_scheme import WeightScheme

PLAIN = {"norm.weight": torch.ones(4), "fc.bias": torch.ones(64)}


def translation(form, weight_format=None):
    """`fc...` are quantized: in `form`, or stored as they are in `weight_format`."""
    weight_format = form.format if form else weight_format
    return Translation(*(lambda name, it=it: it if name.startswith("fc") else None for it in (form, weight_format)))


def marlin(**shape):
    return {f"fc.{name}": tensor for name, tensor in tensors(**shape).items()}


def test_the_tensors_of_a_linear_wait_for_each_other():
    form = Marlin24(INTEGERS[4, 128])
    stored = marlin() | PLAIN | {f"fc2.{name}": tensor for name, tensor in tensors(rows=128).items()}
    expected = form.unpack(tensors())
    for names in (list(stored), sorted(stored), sorted(stored, reverse=True)):
        buffer = {name: stored[name].clone() for name in names}

        def stream(buffer=buffer):
            for name, tensor in buffer.items():
                yield name, tensor
                if tensor.dtype != torch.float32:
                    tensor.fill_(3)  # a reader may use its memory again

        got = dict(translation(form).translate(stream()))
        assert set(got) == {*PLAIN, *(f"{linear}.{part}" for linear in ("fc", "fc2") for part in form.gives)}
        assert all(torch.equal(got[f"fc.{part}"], tensor) for part, tensor in expected.items())
        assert got["fc2.bitmask"].shape == (128, 32)


def test_a_tensor_that_never_came():
    (first, *others) = marlin().items()
    with pytest.raises(RiaError, match=rf"{first[0]} is in none of the weight files"):
        list(translation(Marlin24(INTEGERS[4, 128])).translate(others))


def test_names():
    names = [*marlin(), *PLAIN, "fc.weight_zero_point"]
    got = translation(Marlin24(INTEGERS[4, 128])).names(names)
    assert sorted(got) == sorted([*PLAIN, "fc.compressed", "fc.bitmask", "fc.weight_scale"])
    packed = translation(PackQuantized(INTEGERS[4, 128]))
    stored = [*PLAIN, "fc.weight_packed", "fc.weight_scale", "fc.weight_shape"]
    assert sorted(packed.names(stored)) == sorted([*PLAIN, "fc.weight", "fc.weight_scale"])
    unpacked = [*PLAIN, "fc.weight", "fc.weight_scale", "fc.weight_zero_point", "fc.meta"]
    assert translation(None).names(unpacked) == unpacked
    unpacked.remove("fc.weight_zero_point")
    assert (
        translation(None, INTEGERS[8, None]).names([*unpacked, "fc.weight_zero_point", "fc.weight_g_idx"]) == unpacked
    )
    with pytest.raises(RiaError, match=r"fc\.meta is in none of the weight files"):
        translation(Marlin24(INTEGERS[4, 128])).names(["fc.weight_packed", "fc.scale_packed"])
    for part in ("weight_packed", "scale_packed"):
        with pytest.raises(RiaError, match=rf"gate\.{part}: no group of .* says how this linear is packed"):
            translation(Marlin24(INTEGERS[4, 128])).names([*names, f"gate.{part}"])


@pytest.mark.parametrize(
    ("form", "stored", "message"),
    [
        (Marlin24, tensors() | {"meta": torch.zeros(8, 128, dtype=torch.int16)}, r"fc\.meta: row 0.* get it again"),
        (PackQuantized, {"weight_packed": torch.zeros(8, 8)}, r"fc\.weight_packed: torch\.float32"),
        (PackQuantized, {"weight_zero_point": torch.tensor([0, 1])}, r"fc\.weight_zero_point: asymmetric"),
        (PackQuantized, {"weight_g_idx": torch.tensor([0, 1] * 128)}, r"fc\.weight_g_idx: .*actorder"),
    ],
)
def test_damage_is_named(form, stored, message):
    weights = [(f"fc.{name}", tensor) for name, tensor in stored.items()]
    with pytest.raises(RiaError, match=message):
        list(translation(form(INTEGERS[4, 128])).translate(weights))


@pytest.mark.parametrize(
    ("weight_format", "stored", "message"),
    [
        (INTEGERS[8, None], {"weight_zero_point": torch.tensor([[0], [3]], dtype=torch.int8)}, "asymmetric"),
        (FP8, {"weight_zero_point": torch.tensor([0.5]).to(torch.float8_e4m3fn)}, "asymmetric"),
        (INTEGERS[8, 32], {"weight_g_idx": torch.tensor([0, 1] * 32)}, ".*actorder"),
    ],
)
def test_linears_that_are_not_packed_may_not_be_asymmetric_either(weight_format, stored, message):
    weights = [(f"fc.{name}", tensor) for name, tensor in stored.items()]
    with pytest.raises(RiaError, match=rf"{weights[0][0]}: {message}"):
        list(translation(None, weight_format).translate(weights))
    harmless = [(name, torch.zeros_like(tensor)) for name, tensor in weights if name.endswith("zero_point")]
    assert not list(translation(None, weight_format).translate(harmless))


@pytest.mark.parametrize("index", [torch.arange(256) // 128, torch.full((256,), -1)])
def test_columns_in_order(index):
    weights = {"fc.weight_g_idx": index.int(), "fc.weight_zero_point": torch.zeros(64, 2, dtype=torch.int8)}
    assert not list(translation(PackQuantized(INTEGERS[4, 128])).translate(weights.items()))


CASES = ((4, None), (4, 128), (8, 32))
SPOILED = "dense"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    writer = Writer()
    for name, (bits, size) in enumerate(CASES):
        args = arguments(bits, size)
        for spoiled in ("", SPOILED):
            weight = random_24(96, 256, dtype=torch.bfloat16)
            if spoiled:
                weight += torch.randn(weight.shape).bfloat16()
            writer.add(f"{name}{spoiled}", "pack-quantized", args, weight, scales_of(weight, args))
    return writer.run(tmp_path_factory.mktemp("packed"))


@needs_writer
@pytest.mark.parametrize("spoiled", ["", SPOILED])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_is_what_compressed_tensors_wrote(written, case, spoiled):
    bits, size = CASES[case]
    name, weight_format = f"{case}{spoiled}", INTEGERS[bits, size]
    stored = [(f"fc.{key.partition('.')[2]}", written[key]) for key in written if key.partition(".")[0] == name]
    stored = [(key, tensor) for key, tensor in stored if key not in ("fc.dense", "fc.exact")]
    got = {
        key.removeprefix("fc."): tensor for key, tensor in translation(PackQuantized(weight_format)).translate(stored)
    }
    scheme = WeightScheme(weight_format, dense=True)
    specs = scheme.tensors(torch.bfloat16)
    assert {part: tuple(tensor.shape) for part, tensor in got.items()} == {
        part: spec.shape(96, 256) for part, spec in specs.items()
    }
    loaded = {part: torch.zeros(tensor.shape, dtype=specs[part].dtype).copy_(tensor) for part, tensor in got.items()}
    weights = scheme.weights(loaded, [96], torch.bfloat16, stored_scales={got["weight_scale"].dtype})
    if spoiled:
        assert weights is None
        assert torch.equal(scheme.dense_weight(loaded, [96], torch.float32), written[f"{name}.exact"])
        return
    for dtype, expected in ((torch.bfloat16, "dense"), (torch.float32, "exact")):
        assert torch.equal(weight_format.decode(weights.parts, dtype), written[f"{name}.{expected}"])
    assert weights.parts["weight_scale"].dtype == (torch.float32 if size is None else torch.bfloat16)

"""`save` into integer formats: what rounding does to trained weights."""

import json

import pytest
import torch
from quantized import quantized
from sparse_llama import load, masks

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.format import sparse24
from ria_vllm.format.formats import INT4, INTEGERS
from ria_vllm.training import keep_sparse, save

FORMATS = ["int8", "int4-g32", "fp8"]


def grid_of(name):
    """All values that `compressed` may hold."""
    if name == "fp8":
        found = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return found[found.isfinite()]
    return torch.arange(-8, 8) if "int4" in name else torch.arange(-127, 128)


def relative(left, right):
    return ((left.double() - right.double()).norm() / right.double().norm()).item()


def test_untouched_fp8_keeps_its_bytes(pruned_llama, tmp_path):
    """test_saving.py has the formats that `compress` writes."""
    quantized(pruned_llama.folder, tmp_path / "out", "fp8")
    saved = save(load(tmp_path / "out", torch.bfloat16), tmp_path / "new", like=tmp_path / "out")
    left, right = Reader(tmp_path / "out"), Reader(tmp_path / "new")
    assert (saved.changed, saved.relative_change, saved.rounding) == (0, 0, 0)
    assert all(torch.equal(left.tensor(one), right.tensor(one)) for one in left.files)


@pytest.mark.parametrize("name", FORMATS)
def test_trained_weights_are_rounded_to_the_nearest(pruned_llama, tmp_path, name):
    """By brute force: each kept value is the one, of all there are, whose product with its scale is nearest."""
    quantized(pruned_llama.folder, tmp_path / "out", name)
    model, kept = load(tmp_path / "out"), masks(pruned_llama.folder)
    keep_sparse(model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, mask in kept.items():
            weight = model.get_parameter(one)
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.02 * mask)
    saved = save(model, tmp_path / "new", like=tmp_path / "out")
    reader = Reader(tmp_path / "new")
    assert list(reader.problems()) == [] and saved.changed == 14
    assert reader.schema.weight_format.name == name
    found, wanted, before = [], [], []
    for one in reader.sparse_names:
        linear, old = reader.linear(one), Reader(tmp_path / "out").linear(one)
        weight = model.get_parameter(f"{one}.weight").detach()
        p = linear.input_permutation
        stored = weight if p is None else weight[:, p.long()]
        scale = linear.parts["weight_scale"].float()
        wide = scale.repeat_interleave(stored.shape[1] // scale.shape[1], 1)[..., None]
        grid = grid_of(name)
        nearest = (grid * wide - stored[..., None]).abs().min(-1).values
        written = linear.format.decode(linear.parts, torch.float32)
        mask = sparse24.mask_from_bitmask(linear.parts["bitmask"])
        torch.testing.assert_close(((written - stored).abs() * mask), nearest * mask, rtol=0, atol=1e-6)
        found.append(written.flatten())
        wanted.append(stored.flatten())
        before.append(old.format.decode(old.parts, torch.float32).flatten())
    found, wanted, before = (torch.cat(each) for each in (found, wanted, before))
    assert saved.rounding == pytest.approx(relative(found, wanted), rel=1e-6)
    assert saved.relative_change == pytest.approx(relative(wanted, before), rel=1e-6)
    low, high = {"int8": (0.001, 0.02), "int4": (0.05, 0.2), "fp8": (0.015, 0.04)}[name.partition("-")[0]]
    assert low < saved.rounding < high
    story = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["recipe"]["training"][0]
    assert story["rounding"] == saved.rounding


def test_scales_of_a_row_stay_multiples_of_one_number(pruned_llama, tmp_path):
    quantized(pruned_llama.folder, tmp_path / "out", "int4-g32")
    model = load(tmp_path / "out")
    keep_sparse(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save(model, tmp_path / "new", like=tmp_path / "out")
    old, new = (Reader(tmp_path / folder) for folder in ("out", "new"))
    kept = 0
    for name in new.sparse_names:
        scales = new.linear(name).parts["weight_scale"]
        assert torch.equal(INTEGERS[4, 32].storable(scales), scales), name
        kept += int((scales == old.linear(name).parts["weight_scale"]).all(1).sum())
    assert 0 < kept < sum(len(new.linear(name).parts["bitmask"]) for name in new.sparse_names)


def test_scales_that_were_chosen_well_are_kept(pruned_llama, tmp_path):
    """The better scale of each row: the old one, or that of the largest magnitude."""
    quantized(pruned_llama.folder, tmp_path / "out", "int4", shrink=0.8)
    model = load(tmp_path / "out")
    keep_sparse(model)
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_parameter(f"{name}.weight")
    with torch.no_grad():
        weight.mul_(1.001)
        weight[3] *= 3  # the old scale would clip it
    save(model, tmp_path / "new", like=tmp_path / "out")
    old, new = (Reader(tmp_path / folder).linear(name) for folder in ("out", "new"))
    largest = INT4.scales_of(weight.detach())
    for scales in (old.parts["weight_scale"], largest):
        other, _ = INT4.quantize(weight.detach(), torch.bfloat16, scales)
        errors = [(one.float() - weight.detach()).square().sum(1) for one in (new.stored(), other)]
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and (errors[0] < errors[1] * 0.9).any()
    kept = (new.parts["weight_scale"] == old.parts["weight_scale"]).flatten()
    assert not kept[3] and kept.float().mean() > 0.5

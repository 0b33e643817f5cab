"""Models that are 2:4 already, as Sparse-Llama-3.1-8B-2of4 is: their masks stay, in every scheme and from every form.

The oracles are the source's own zeros, and transformers on the weights that compressed-tensors' own code reads.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors_writer import Writer, needs_writer, random_24, scales_of
from compressing import edit_config, edit_weights, edited, interrupted_after_a_layer, run_small, weight_digests
from moe import save_moe
from recovered import is_linear, save_recovered, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import SCHEMES
from ria_vllm.format.sparse24 import mask_from_bitmask
from ria_vllm.offline.model.files.source_tensors import SourceTensors
from ria_vllm.offline.run.compress import Settings

NOT_24 = "it is not 2:4, as others of the model are (--prune-rest prunes it)"
UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
TOKENS = torch.randint(2, 258, (2, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def recovered(tmp_path_factory) -> Path:
    """Do not write into it."""
    return save_recovered(tmp_path_factory.mktemp("recovered") / "llama")


def check_masks(source: dict[str, torch.Tensor], out: Path, linears: list[str] | None = None) -> Reader:
    """Each mask has all of the source's non-zeros, and no zero of the source became a weight. Nothing is permuted."""
    reader = Reader(out)
    wanted = [name.removesuffix(".weight") for name in source if is_linear(name)] if linears is None else linears
    assert list(reader.problems()) == [] and not set(wanted) & set(reader.permutations)
    for name in wanted:
        there, linear = source[f"{name}.weight"] != 0, reader.linear(name)
        mask = mask_from_bitmask(linear.parts["bitmask"])
        assert bool((mask.view(-1, 4).sum(1) == 2).all()) and not bool((there & ~mask).any())
        dense = linear.dense()
        assert not bool((dense[~there] != 0).any())
    return reader


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masks_stay_in_every_scheme(scheme, recovered, text, tmp_path):
    report, warnings = run_small(recovered, tmp_path / "out", text, reconstruct="short", **SCHEMES[scheme])
    source = weights_of(recovered)
    reader = check_masks(source, tmp_path / "out")
    assert len(reader.sparse_names) == 14 == report["kept"]["linears"] and not report["kept"]["pruned"]
    assert not any("block_loss" in record for record in report["linears"].values()) and not warnings
    if scheme == "BF16":
        for name in source:
            kept = name.removesuffix(".weight") in reader.sparse_names
            assert torch.equal(reader.linear(name[:-7]).dense() if kept else reader.tensor(name), source[name])
        dense = AutoModelForCausalLM.from_pretrained(recovered, dtype=torch.bfloat16)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(dense))


def test_nothing_is_read_where_weights_are_copied(recovered, tmp_path):
    """Neither a text, which is not there, nor the whole model, to write one."""
    report, _ = run_small(recovered, tmp_path / "out", tmp_path / "no.txt", reconstruct="block")
    assert report["recipe"]["calibration"] == "none" and report["recipe"]["method"] == "another program's"
    assert report["verdict"]["quality"] == "Its weights are the dense model's: nothing is lost."
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- {report['verdict']['quality']}" in card
    assert "pruned by another program" in card and "| 2:4 already | 14 of them, which kept their zeros |" in card


def inputs_of(folder: Path, text: Path, name: str) -> torch.Tensor:
    """What a linear reads of the text, in the model as transformers runs it: float64 [tokens, in]."""
    model, read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1)))
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text()).input_ids[:8192]
    with torch.no_grad():
        model(torch.tensor(tokens).view(-1, 64))
    hook.remove()
    return read[0].double()


def test_rounding_errors_make_up_for_each_other(recovered, text, tmp_path):
    """On the text, against rounding to the nearest with the scales that cost least."""
    for way in ("none", "short"):
        options = SCHEMES["W4A16"] | {"reconstruct": way, "samples": 32, "seq_len": 64}
        run_small(recovered, tmp_path / way, text, **options)
    source = weights_of(recovered)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"):
        read, exact = inputs_of(recovered, text, name), source[f"{name}.weight"].double()
        nearest, ours = (read @ (Reader(tmp_path / way).linear(name).dense() - exact).T for way in ("none", "short"))
        assert ours.norm() < 0.9 * nearest.norm()


FORMS = {
    "bitmask": ("dense", None, True),
    "fp8, zeros": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, False),
    "fp8, a scale, bitmask": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, True),
    "marlin-24": ("marlin-24", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, False),
    "marlin-24, int8": ("marlin-24", {"num_bits": 8, "type": "int", "strategy": "channel"}, False),
    "pack-quantized": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, False),
    "int-quantized": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(recovered, tmp_path_factory):
    """Form -> (folder as compressed-tensors' own code stored the recovered model, the weights that it reads)."""
    place = tmp_path_factory.mktemp("stored")
    source, writer = weights_of(recovered), Writer()
    for number, (form, weights, sparse) in enumerate(FORMS.values()):
        for name in filter(is_linear, source):
            scale = None if weights is None else scales_of(source[name], weights)
            scale = None if scale is None else torch.where(scale > 0, scale, 1)
            arguments = weights and weights | {"symmetric": True}
            writer.add(f"{number}/{name[:-7]}", form, arguments, source[name], scale, sparse)
    written = writer.run(place / "written")
    found = {}
    for number, (kind, (form, weights, sparse)) in enumerate(FORMS.items()):
        folder = place / str(number)
        shutil.copytree(recovered, folder, ignore=shutil.ignore_patterns("model*"))
        mine = {name.partition("/")[2]: one for name, one in written.items() if name.startswith(f"{number}/")}
        meant = {f"{name[:-7]}.weight": mine.pop(f"{name[:-7]}.exact") for name in source if is_linear(name)}
        others = {name: one for name, one in source.items() if not is_linear(name)}
        mine = {name: one for name, one in mine.items() if not name.endswith(".dense")}
        save_file(others | mine, folder / "model.safetensors")
        group = {"targets": ["Linear"], "weights": weights and weights | {"symmetric": True}, "format": form}
        words = {
            "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "version": "0.12.2",
            "config_groups": {} if weights is None else {"group_0": group},
            "sparsity_config": {} if form == "marlin-24" else {
                "format": "sparse-24-bitmask" if sparse else "dense", "sparsity_structure": "2:4",
                "targets": ["Linear"], "ignore": ["lm_head"], "global_sparsity": 0.5,
            },
        }  # fmt: skip
        edit_config(folder, quantization_config=words)
        found[kind] = folder, others | meant
    return found


@needs_writer
@pytest.mark.parametrize("kind", FORMS)
def test_forms_of_compressed_tensors(kind, stored, text, tmp_path):
    folder, meant = stored[kind]
    run_small(folder, tmp_path / "out", text)
    reader = check_masks(meant, tmp_path / "out")
    assert len(reader.sparse_names) == 14
    for name in reader.sparse_names:
        assert torch.equal(reader.linear(name).dense(), meant[f"{name}.weight"].bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "ria"


@needs_writer
@pytest.mark.parametrize(
    ("kind", "scheme", "loss"),
    [("fp8, a scale, bitmask", "W8A8", 0.1), ("marlin-24", "W4A8", 0.3), ("pack-quantized", "W8A8", 0.1)],
)
def test_forms_become_integers(kind, scheme, loss, recovered, stored, text, tmp_path):
    """The masks stay, and transformers computes nearly what it does with the weights that compressed-tensors reads."""
    folder, meant = stored[kind]
    run_small(folder, tmp_path / "out", text, reconstruct="admm", **SCHEMES[scheme])
    assert len(check_masks(meant, tmp_path / "out").sparse_names) == 14
    dense = AutoModelForCausalLM.from_pretrained(recovered, dtype=torch.float32)
    dense.load_state_dict(meant, strict=False)
    wanted, found = logits(dense), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert 0 < (found - wanted).norm() <= loss * wanted.norm()


DAMAGE = {
    "": (lambda t: t.pop("bitmask"), "compressed, weight_scale are in the files; by .*, it should be"),
    "short": (lambda t: t.update(compressed=t["compressed"][:, 4:]), r"compressed is torch.float8_e4m3fn .*, expected"),
    "mask": (lambda t: t["bitmask"].fill_(255), "a group of 4 without exactly 2 kept values"),
    "nan": (lambda t: t["weight_scale"].fill_(torch.nan), "a weight_scale is not a finite number"),
    "zero": (lambda t: t.update(weight_zero_point=torch.ones(1)), "asymmetric weights are not served"),
}  # fmt: skip


@needs_writer
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_of_compressed_tensors(how, stored, tmp_path):
    folder = shutil.copytree(stored["fp8, a scale, bitmask"][0], tmp_path / "in")
    change, message = DAMAGE[how]

    def damage(tensors):
        mine = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{UP}.")}
        parts = {name.removeprefix(f"{UP}."): one for name, one in mine.items()}
        change(parts)
        tensors |= {f"{UP}.{part}": one.contiguous() for part, one in parts.items()}

    edit_weights(folder, damage)
    with pytest.raises(RiaError, match=f"{UP}.*{message}"):
        SourceTensors(folder, torch.bfloat16).read(f"{UP}.weight")


def spoil(recovered: Path, folder: Path) -> Path:
    """Layer 0's up_proj has a third value in one group."""
    shutil.copytree(recovered, folder)
    name = "model.layers.0.mlp.up_proj.weight"
    path = next(path for path in folder.glob("model-*") if name in load_file(path))
    tensors = load_file(path)
    tensors[name][-1, -4:] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_linears_that_are_not_24_stay_dense(recovered, text, tmp_path):
    """So does what vLLM fuses with them."""
    source = spoil(recovered, tmp_path / "in")
    report, warnings = run_small(source, tmp_path / "out", text, reconstruct="short", **SCHEMES["W8A8"])
    weights = weights_of(source)
    others = [name[:-7] for name in weights if is_linear(name) and name[:-7] not in (UP, GATE)]
    reader = check_masks(weights, tmp_path / "out", others)
    assert set(reader.sparse_names) == set(others)
    assert report["dense"][UP] == NOT_24 and report["dense"][GATE] == "served as one with mlp.up_proj"
    assert f"mlp.up_proj: {NOT_24}; left dense in 1 layers." in warnings


@pytest.mark.parametrize("scheme", ["W8A8"])
def test_prune_rest(scheme, recovered, text, tmp_path):
    source = spoil(recovered, tmp_path / "in")
    options = {"reconstruct": "short", "prune_rest": True, "samples": 8} | SCHEMES[scheme]
    report, _ = run_small(source, tmp_path / "out", text, **options)
    weights = weights_of(source)
    others = [name[:-7] for name in weights if is_linear(name) and name[:-7] != UP]
    assert "nothing is lost" not in report["verdict"]["quality"]
    reader = check_masks(weights, tmp_path / "out", others)
    assert report["kept"] == {"linears": 13, "pruned": 1} and UP in reader.sparse_names
    assert {name for name, record in report["linears"].items() if "block_loss" in record} == {UP}
    assert scheme != "BF16" or all(torch.equal(reader.linear(one).dense(), weights[f"{one}.weight"]) for one in others)
    with interrupted_after_a_layer():
        run_small(source, tmp_path / "again", text, **options)
    run_small(source, tmp_path / "again", text, settings=Settings(resume=True), **options)
    assert weight_digests(tmp_path / "again") == weight_digests(tmp_path / "out")


def test_zeros_alone_are_no_proof(tiny, text, tmp_path):
    """A linear of zeros, and one with one value in eight, in a dense model: all are pruned as usual."""

    def change(tensors):
        tensors[f"{GATE}.weight"].zero_()
        tensors[f"{UP}.weight"].view(-1, 8)[:, 1:] = 0
        tensors[f"{UP}.weight"].view(-1, 16)[:, 0] = 0

    source = edited(tiny("llama"), tmp_path / "in", change)
    report, _ = run_small(source, tmp_path / "out", text)
    assert "kept" not in report and len(report["linears"]) == 14 and Reader(tmp_path / "out").permutations


def test_a_wider_pattern_is_not_pruned_again_unasked(tiny, text, tmp_path):
    def change(tensors):
        for name in filter(is_linear, tensors):
            tensors[name].view(-1, 16)[:, 8:] = 0

    source = edited(tiny("llama"), tmp_path / "in", change)
    with pytest.raises(RiaError, match="layers.0.*is 8:16 already.*--pattern 8:16 keeps.*--prune-rest"):
        run_small(source, tmp_path / "out", text)
    _, warnings = run_small(source, tmp_path / "out", text, prune_rest=True)
    assert "no linear is 2:4 already" in warnings[0] and len(Reader(tmp_path / "out").sparse_names) == 14


@pytest.mark.parametrize("scheme", ["BF16", "W4A16"])
def test_experts(scheme, text, tmp_path):
    """Those of layer 1 are not 2:4, because one weight of one expert is not zero."""
    source = save_moe(tmp_path / "in", "qwen3_moe")

    def change(tensors):
        for seed, (name, one) in enumerate(tensors.items()):
            if is_linear(name):
                one.mul_(random_24(*one.shape, seed=seed) != 0)
        tensors["model.layers.1.mlp.experts.3.down_proj.weight"][0, :4] = 1

    edit_weights(source, change)
    weights = weights_of(source)
    report, _ = run_small(source, tmp_path / "out", text, reconstruct="short", **SCHEMES[scheme])
    assert report["dense"]["model.layers.1.mlp.experts"] == NOT_24
    kept = [name[:-7] for name in weights if is_linear(name) and ".1.mlp.experts." not in name]
    reader = check_masks(weights, tmp_path / "out", kept)
    assert set(reader.sparse_names) == set(kept)
    report, _ = run_small(source, tmp_path / "all", text, prune_rest=True, **SCHEMES[scheme])
    check_masks(weights, tmp_path / "all", kept)
    assert report["kept"] == {"linears": len(kept), "pruned": 12} and "quality" not in report["verdict"]

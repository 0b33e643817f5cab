"""`save`: a trained model as a compressed folder like the one that it came from."""

import json
import shutil

import pytest
import tiny
import torch
from compressing import run_small
from damage import prove, rewrite
from moe import save_moe
from safetensors.torch import load_file
from sparse_llama import load, masks, train
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from wrappers import compressed_wrapper

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.training import keep_sparse, save

TOKENS = torch.arange(3, 40)[None]


def trained(folder, dtype=torch.float32, auto=AutoModelForCausalLM, lr=1e-2):
    """Kept sparse, and moved by one step that gives every weight a gradient."""
    model = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    keep_sparse(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter)
    torch.optim.SGD(model.parameters(), lr=lr).step()
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def check_like(new, like):
    """Everything but the values, their digest and proofs is as it was: masks, permutations, names, dtypes, files."""
    reader, before = Reader(new), Reader(like)
    assert list(reader.problems()) == []
    assert list(reader.files) == list(before.files) or set(reader.files) == set(before.files)
    for name in reader.files:
        assert (
            reader.tensor(name).dtype == before.tensor(name).dtype
            and reader.tensor(name).shape == before.tensor(name).shape
        ), name
        if name.endswith((".bitmask", ".shape")):
            assert torch.equal(reader.tensor(name), before.tensor(name)), name
    assert reader.permutations.keys() == before.permutations.keys()
    assert all(torch.equal(p, before.permutations[name]) for name, p in reader.permutations.items())
    left, right = (r.config["quantization_config"] for r in (reader, before))
    assert left["proofs"]["seed"] == right["proofs"]["seed"] and reader.proofs().keys() == before.proofs().keys()
    changing = dict.fromkeys(("recipe", "weights_digest", "proofs"))
    assert {**left, **changing} == {**right, **changing}
    assert left["recipe"].items() >= right["recipe"].items()
    return reader


def test_float_weights_come_back_as_they_were_trained(pruned_llama, tmp_path):
    model = trained(pruned_llama.folder, torch.bfloat16)
    saved = save(model, tmp_path / "new", like=pruned_llama.folder, note="one step")
    check_like(tmp_path / "new", pruned_llama.folder)
    again = load(tmp_path / "new", torch.bfloat16)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert saved.linears == saved.changed == 14 and saved.rounding == 0 and saved.kept == []
    old = torch.cat([t.flatten() for n, t in pruned_llama.dense.items() if f"{n}" in masks(pruned_llama.folder)])
    now = torch.cat([state[n].flatten() for n in pruned_llama.dense if n in masks(pruned_llama.folder)])
    want = ((now.double() - old.double()).norm() / old.double().norm()).item()
    assert saved.relative_change == pytest.approx(want, rel=1e-6) and want > 0.01


UP = "model.layers.0.mlp.up_proj"


def test_the_recipe_and_the_card_say_what_happened(pruned_llama, tmp_path):
    folder = tmp_path / "like"
    shutil.copytree(pruned_llama.folder, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nperplexity 12.34\n")
    report = {
        "verdict": {"quality": "Near.", "size": "9 MB of weights"},
        "measured": {"Speed": {"rows": [{"users": "1"}]}},
    }
    report |= {"linears": {UP: {"retained_after": 0.9, "error_after": 2}}}
    (folder / "ria_report.json").write_text(json.dumps(report))
    save(trained(folder), tmp_path / "once", like=folder, note="SFT | on 3 chats")
    save(load(tmp_path / "once"), tmp_path / "twice", like=tmp_path / "once")
    story = Reader(tmp_path / "twice").schema.recipe["training"]
    assert [entry["note"] for entry in story] == ["SFT | on 3 chats", ""]
    assert [entry["changed"] for entry in story] == [14, 0] and story[0]["dtype"] == "float32"
    card = (tmp_path / "once" / "README.md").read_text()
    assert "| pruned linears | 14 |" in card and "| sparsity | 2:4; 50.0% of the weights" in card
    assert "| retained score, mean | 0.9000 |" in card and f"worst | 0.9000, `{UP}` |" in card
    assert "license: mit" in card and "12.34" not in card and "trained after that, with the masks fixed: SFT" in card
    report = json.loads((tmp_path / "once" / "ria_report.json").read_text())
    assert "\n- 9 MB of weights\n" in card and "Near." not in card and "users" not in card
    assert report["verdict"] == {"size": "9 MB of weights"} and "measured" not in report
    assert report["linears"] == {UP: {"retained_after": 0.9}} and report["recipe"]["training"][0]["changed"] == 14
    names = {path.name for path in folder.iterdir() if "safetensors" not in path.name}
    assert names == {path.name for path in (tmp_path / "once").iterdir() if "safetensors" not in path.name}
    assert (tmp_path / "once" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", sorted(tiny.FAMILIES))
def test_families(name, tmp_path):
    """Tied heads, biases, fused linears, and other names on disk. transformers' classes fill in, rename and derive
    settings as they load a model, and config.json stays as it was all the same."""
    tiny.write(tiny.FAMILIES[name], tmp_path / "out")
    model = trained(tmp_path / "out")
    assert save(model, tmp_path / "new", like=tmp_path / "out").settings == []
    check_like(tmp_path / "new", tmp_path / "out")
    left, right = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("new", "out"))
    assert left | {"quantization_config": None} == right | {"quantization_config": None}
    generation = [(tmp_path / folder / "generation_config.json").exists() for folder in ("new", "out")]
    assert generation[0] == generation[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="eager")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_a_wrapper(name, tmp_path):
    compressed_wrapper(tmp_path, name)
    model = trained(tmp_path / "out", auto=AutoModelForImageTextToText)
    save(model, tmp_path / "new", like=tmp_path / "out")
    check_like(tmp_path / "new", tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "new", attn_implementation="eager").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["qwen3_moe", "granitemoe", "gpt_oss", "llama4_text"])
def test_experts_are_stored_one_by_one_again(kind, tmp_path, tmp_path_factory):
    text = tmp_path / "text.txt"
    text.write_text("Many words are written here, and then some more of them. " * 40)
    run_small(save_moe(tmp_path / "in", kind), tmp_path / "out", text)
    model = trained(tmp_path / "out")
    save(model, tmp_path / "new", like=tmp_path / "out")
    reader = check_like(tmp_path / "new", tmp_path / "out")
    assert sum(".experts." in name for name in reader.sparse_names) == 2 * 4 * 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in state.items():
        if "experts" in name and "bias" not in name:
            assert (tensor != before[name]).float().mean() == pytest.approx(0.5, abs=0.01), name


@pytest.mark.parametrize(
    ("weights", "loaded", "then"),
    [
        ("float", "bfloat16", None), ("float", "float16", "float32"), ("int8", "bfloat16", "float32"),
        ("int8", "float32", "float16"), ("int4-g32", "float16", None), ("int4-g32", "bfloat16", "float32"),
    ],
)  # fmt: skip
def test_what_nobody_trained_keeps_its_bytes(weights, loaded, then, tmp_path):
    """Also where the model has rounded it: FSDP2 widens what was loaded in bfloat16."""
    quantized = weights != "float"
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "out", dtype=torch.float32, weights=weights, head=quantized)
    model = load(tmp_path / "out", getattr(torch, loaded)).to(getattr(torch, then or loaded))
    saved = save(model, tmp_path / "new", like=tmp_path / "out")
    assert (saved.changed, saved.relative_change, saved.rounding) == (0, 0, 0)
    before, after = Reader(tmp_path / "out"), Reader(tmp_path / "new")
    assert before.files.keys() == after.files.keys()
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.files)
    exact = before.tensor("model.norm.weight")
    assert exact.dtype == torch.float32 and not torch.equal(exact.bfloat16().float(), exact)
    with torch.no_grad():
        for name in ("model.norm", UP, "lm_head"):
            model.get_submodule(name).weight.mul_(1.5)
    saved = save(model, tmp_path / "trained", like=tmp_path / "out")
    after = Reader(tmp_path / "trained")
    changed = {name for name in before.files if not torch.equal(before.tensor(name), after.tensor(name))}
    assert saved.changed == 1 and {name.removeprefix(f"{UP}.") for name in changed} <= {
        "model.norm.weight", "compressed", "weight_scale", "lm_head.weight_scale", "lm_head.integers", "lm_head.weight"
    }  # fmt: skip
    assert any(name.startswith("lm_head.") for name in changed)  # the same integers by scales that are half larger
    assert len(changed) > 1 and "model.norm.weight" in changed


def test_a_weight_outside_the_mask(pruned_llama, tmp_path):
    model = load(pruned_llama.folder)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    with pytest.raises(RiaError, match=r"_proj: \d+ of its weights are not zero.*keep_sparse.*adapter was merged"):
        save(model, tmp_path / "new", like=pruned_llama.folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "value"), [("model.norm", torch.nan), ("model.layers.1.mlp.up_proj", torch.inf)])
def test_a_value_that_is_not_finite(pruned_llama, tmp_path, name, value):
    model = load(pruned_llama.folder)
    keep_sparse(model)
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight[weight != 0] = value
    with pytest.raises(RiaError, match=f"{name}.*NaN or infinite.*diverged"):
        save(model, tmp_path / "new", like=pruned_llama.folder)
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_the_dtype(tmp_path):
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "out", dtype=torch.float16)
    for name in ("model.layers.1.mlp.up_proj", "model.norm"):
        model = load(tmp_path / "out")
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(1e9)
        with pytest.raises(RiaError, match=f"{name}.*too large for the folder's dtype"):
            save(model, tmp_path / "new", like=tmp_path / "out")


def test_another_vocabulary(pruned_llama, tmp_path):
    model = load(pruned_llama.folder)
    model.resize_token_embeddings(300)
    with pytest.raises(RiaError, match=r"shape \(300, 128\) in the model, but \(258, 128\)"):
        save(model, tmp_path / "new", like=pruned_llama.folder)


def test_another_class(pruned_llama, tmp_path):
    model = load(pruned_llama.folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(pruned_llama.folder)
    with pytest.raises(RiaError, match=r"score.weight has no place in this folder.*LlamaForCausalLM"):
        save(classifier, tmp_path / "new", like=pruned_llama.folder)
    with pytest.raises(RiaError, match="this is the folder being read"):
        save(model, pruned_llama.folder, like=pruned_llama.folder, overwrite=True)
    (tmp_path / "new").mkdir()
    with pytest.raises(RiaError, match="exists already"):
        save(model, tmp_path / "new", like=pruned_llama.folder)


def test_a_folder_with_other_masks(pruned_llama, damage, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    damage.replace(f"{name}.bitmask", lambda bitmask: bitmask.bitwise_not())
    with pytest.raises(RiaError, match=f"{name}: .* are not zero though they are pruned in"):
        save(load(pruned_llama.folder), tmp_path / "new", like=damage.folder)


def test_tensors_that_the_model_does_not_have_stay(tmp_path):
    """Such as a vision tower, where only the text model was loaded."""
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "out")
    tower = {"vision_tower.weight": torch.randn(3, 5)}
    rewrite(tmp_path / "out" / "model.safetensors", lambda tensors: tensors.update(tower))
    prove(tmp_path / "out")
    saved = save(trained(tmp_path / "out"), tmp_path / "new", like=tmp_path / "out")
    assert saved.kept == ["vision_tower.weight"]
    reader = check_like(tmp_path / "new", tmp_path / "out")
    assert torch.equal(reader.tensor("vision_tower.weight"), tower["vision_tower.weight"])


def test_a_head_that_training_has_untied(tmp_path):
    """PEFT trains a copy of the head (`modules_to_save`). Where config.json ties them, vLLM reads the embeddings."""
    tiny.write(tiny.FAMILIES["gemma2"], tmp_path / "out")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path / "out" / "model.safetensors", add_head)
    model = trained(tmp_path / "out")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1.0)
    with pytest.raises(RiaError, match=r"lm_head.weight and model.embed_tokens.weight are one tensor"):
        save(model, tmp_path / "new", like=tmp_path / "out")
    model.config.tie_word_embeddings = False
    assert save(model, tmp_path / "new", like=tmp_path / "out").settings == ["tie_word_embeddings"]
    again = load(tmp_path / "new")
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.to(Reader(tmp_path / "new").tensor("lm_head.weight")))


def test_several_shards(pruned_llama, tmp_path):
    save(trained(pruned_llama.folder), tmp_path / "new", like=pruned_llama.folder, max_shard_size=100_000)
    files = sorted((tmp_path / "new").glob("model-*.safetensors"))
    assert len(files) > 3 and sum(len(load_file(file)) for file in files) == len(Reader(tmp_path / "new").files)
    check_like(tmp_path / "new", pruned_llama.folder)


def test_a_folder_without_a_pruned_linear_comes_back_as_it_was_trained(tmp_path):
    """What `--max-loss` may write: all linears are in int8."""
    like, new = tmp_path / "like", tmp_path / "new"
    tiny.write(tiny.FAMILIES["llama-gqa"], like, dense=("_proj",), weights="int8", permuted=False, int8=True, head=True)
    model = load(like)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    saved = save(model, new, like=like)
    check_like(new, like)
    assert saved.linears == 0 and torch.equal(load(new).model.norm.weight, model.model.norm.weight)

"""Tensors whose names in the files are not transformers', or that transformers has no use for: none is lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.offline import compress as pipeline
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.layers import LayerPass
from ria_vllm.offline.model import names
from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor

TOKENS = torch.arange(2, 60)[None]


class Heard(Monitor):
    """Keeps what is said to the user."""

    def __init__(self):
        super().__init__(shown=False)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def run(model: Path, out: Path, text: Path, settings: Settings = Settings(), **options) -> tuple[dict, list[str]]:
    recipe = Recipe(**{"calibration": str(text), "samples": 4, "seq_len": 32, "reconstruct": "none"} | options)
    monitor = Heard()
    return compress(str(model), out, recipe, settings, monitor), monitor.warnings


def edited(source: Path, folder: Path, change, **config) -> Path:
    """A copy of a model with its tensors as `change` leaves them."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def put(tensors: dict, name: str) -> None:
    tensors[name][7] += 1


def put_away(name: str) -> str:
    """As the hub has Qwen 3.5: the text model under language_model."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def check_whole(source: Path, out: Path) -> Reader:
    """Every tensor of the source is in the output once, by its own name; what is dense, bit by bit."""
    reader = Reader(out)
    assert list(reader.problems()) == []
    original = load_file(source / "model.safetensors")
    assert {*reader.dense_names, *(f"{name}.weight" for name in reader.sparse_names)} == set(original)
    assert not {f"{name}.weight" for name in reader.sparse_names} & set(reader.files)
    for name in reader.dense_names:
        assert torch.equal(reader.tensor(name), original[name])
    for name in reader.sparse_names:
        dense = reader.linear(name).dense()
        assert torch.equal(dense, original[f"{name}.weight"] * (dense != 0))
    assert not any(reader.schema.ignored(name) for name in reader.sparse_names)
    return reader


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


def check_export(source: Path, reader: Reader, folder: Path, inside) -> None:
    """transformers computes with the compressed folder and the exported one what it does with the original, its linears
    pruned in memory.

    Args:
        inside: a linear's name in the files -> in transformers' model.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    dense = logits(source)
    with torch.no_grad():
        for name in reader.sparse_names:
            model.get_submodule(inside(name)).weight.copy_(reader.linear(name).dense())
        expected = model(TOKENS).logits
    export_dense(reader, folder, 1 << 40)
    assert torch.equal(logits(folder), expected) and torch.equal(logits(reader.folder), expected)
    assert not torch.allclose(expected, dense, atol=1e-2)


def linear_weights(source: Path) -> int:
    """Of all linears in the decoder layers."""
    layers = AutoModelForCausalLM.from_pretrained(source).model.layers
    return sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))


def test_nemotron_h(tiny, text, tmp_path):
    """Layers of four kinds; in the files `backbone.` where transformers has `model.`, and experts one by one."""
    source = tiny("nemotron-h")
    stored = load_file(source / "model.safetensors")
    assert "backbone.embeddings.weight" in stored and "backbone.layers.3.mixer.experts.0.up_proj.weight" in stored
    report, warnings = run(source, tmp_path / "out", text)
    reader = check_whole(source, tmp_path / "out")
    beyond = [name for name, why in report["dense"].items() if why.startswith("not in the first layer")]
    share = sum(stored[f"{name}.weight"].numel() for name in beyond) / linear_weights(source)
    assert any(f"{len(beyond)} linears are not in the first layer" in w and f" {share:.0%} of" in w for w in warnings)
    assert set(reader.sparse_names) == {f"backbone.layers.0.mixer.{x}_proj" for x in ("in", "out")} == set(report["linears"])
    assert "backbone.layers.1.mixer.q_proj" in report["dense"] and reader.schema.ignored("backbone.layers.1.mixer.q_proj")
    check_export(source, reader, tmp_path / "dense", lambda name: name.replace("backbone", "model"))


def test_qwen_as_the_hub_has_it(tiny, text, tmp_path):
    source = edited(tiny("qwen3.5"), tmp_path / "in", lambda t: {put_away(name): tensor for name, tensor in t.items()})
    run(source, tmp_path / "out", text)
    reader = check_whole(source, tmp_path / "out")
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv" in reader.sparse_names
    check_export(source, reader, tmp_path / "dense", lambda name: name.replace("language_model.", ""))


def test_gpt_neox_with_the_head_under_its_old_name(tiny, text, tmp_path):
    stored = load_file(tiny("gpt-neox") / "model.safetensors")
    assert "embed_out.weight" in stored  # transformers gives it back its old name when it saves
    run(tiny("gpt-neox"), tmp_path / "out", text)
    reader = check_whole(tiny("gpt-neox"), tmp_path / "out")
    assert reader.schema.ignored("embed_out")
    check_export(tiny("gpt-neox"), reader, tmp_path / "dense", lambda name: name)


@pytest.fixture
def renamed(tiny, tmp_path, monkeypatch) -> Path:
    """A Llama in a family that transformers renames: everything that a known family has, folds too."""
    real = names.get_model_conversion_mapping
    monkeypatch.setattr(
        names, "get_model_conversion_mapping", lambda model: [WeightRenaming("^trunk.blocks", "model.layers"), *real(model)]
    )

    def change(tensors):
        return {name.replace("model.layers", "trunk.blocks"): tensor for name, tensor in tensors.items()}

    return edited(tiny("llama"), tmp_path / "renamed", change)


def test_folds_and_permutations_have_the_names_of_the_files(renamed, tiny, text, tmp_path):
    options = {"ignore": ("blocks.0.mlp.down|layers.0.mlp.down",), "skip_sensitive": 0.2, "reconstruct": "admm"}
    one, _ = run(tiny("llama"), tmp_path / "one", text, **options)
    two, _ = run(renamed, tmp_path / "two", text, **options)
    plain, other = Reader(tmp_path / "one"), Reader(tmp_path / "two")
    assert list(other.problems()) == []

    def rename(name):
        return name.replace("model.layers", "trunk.blocks")

    assert sorted(other.sparse_names) == sorted(map(rename, plain.sparse_names))
    assert sorted(other.permuted_names) == sorted(map(rename, plain.permuted_names))
    assert [f.model_dump() for f in other.schema.folds] == json.loads(
        rename(json.dumps([f.model_dump() for f in plain.schema.folds]))
    )
    assert len(other.schema.folds) == 2
    assert set(other.schema.sparsity_config.ignore) == set(map(rename, plain.schema.sparsity_config.ignore))
    assert two["linears"] == {rename(name): record for name, record in one["linears"].items()}
    for name in plain.sparse_names:
        assert torch.equal(plain.linear(name).dense(), other.linear(rename(name)).dense())


def test_a_renamed_model_goes_on_from_what_is_finished(renamed, text, tmp_path, monkeypatch):
    run(renamed, tmp_path / "whole", text, reconstruct="admm")
    say, said = pipeline._say_layer, []

    def stop(*arguments):
        said.append(say(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_say_layer", stop)
        run(renamed, tmp_path / "out", text, reconstruct="admm")
    run(renamed, tmp_path / "out", text, Settings(resume=True), reconstruct="admm")
    assert len(said) == 1
    assert all((tmp_path / "out" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "whole").iterdir())


EXTRA = (
    "model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight",
    "mtp.fc.weight", "model.layers.10.mlp.up_proj.weight",
)  # fmt: skip


def test_layers_beyond_the_models_own_are_copied(tiny, text, tmp_path):
    """As in DeepSeek-V3 and GLM-4.5, for multi-token prediction."""

    def change(tensors):
        tensors |= {name: torch.randn(64, 128) for name in EXTRA}
        tensors["model.layers.2.enorm.weight"] = torch.randn(128)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(16)

    source = edited(tiny("llama"), tmp_path / "in", change)
    report, warnings = run(source, tmp_path / "out", text)
    reader = Reader(tmp_path / "out")
    original = load_file(source / "model.safetensors")
    lost = {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert {*reader.dense_names, *(f"{name}.weight" for name in reader.sparse_names)} == set(original) - lost
    assert all(torch.equal(reader.tensor(name), original[name]) for name in reader.dense_names)
    assert list(reader.problems()) == [] and len(reader.sparse_names) == 14
    extra = [name.removesuffix(".weight") for name in EXTRA if "experts" not in name]
    assert all(reader.schema.ignored(name) and "no part of the model" in report["dense"][name] for name in extra)
    assert not reader.schema.ignored("model.layers.2.enorm")
    said = [text for text in warnings if "copied as they are" in text]
    assert said == [
        "copied as they are: model.layers.10.mlp.up_proj.weight and 5 more tensors, no part of LlamaForCausalLM as "
        "transformers builds it."
    ]
    assert torch.equal(logits(tmp_path / "out"), logits_of_pruned(tiny("llama"), reader))


def logits_of_pruned(source: Path, reader: Reader) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name in reader.sparse_names:
            model.get_submodule(name).weight.copy_(reader.linear(name).dense())
        return model(TOKENS).logits


@pytest.mark.parametrize("forgotten", ["lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_a_tensor_that_would_be_lost_is_an_error(forgotten, tiny, text, tmp_path, monkeypatch):
    for method in ("names_outside_layers", "names_in_layer"):
        real = getattr(StreamedModel, method)
        left = lambda self, *a, real=real: [name for name in real(self, *a) if name != forgotten]  # noqa: E731
        monkeypatch.setattr(StreamedModel, method, left)
    if forgotten.startswith("model"):  # else it would count as one outside
        real_outside = StreamedModel.names_outside_layers
        kept = lambda self: [name for name in real_outside(self) if "layers" not in name]  # noqa: E731
        monkeypatch.setattr(StreamedModel, "names_outside_layers", kept)
    monkeypatch.setattr(LayerPass, "prune", lambda *_, **__: pytest.fail("pruned"))
    with pytest.raises(RiaError, match=f"{forgotten} would be missing in the output"):
        run(tiny("llama"), tmp_path / "out", text)
    assert not list(tmp_path.glob("out*"))


def test_an_error_at_the_end_costs_no_finished_layer(tiny, text, tmp_path, monkeypatch):
    lost = "model.layers.1.input_layernorm.weight"
    with monkeypatch.context() as patch:
        whole = pipeline.layer_tensors
        patch.setattr(pipeline, "layer_tensors", lambda *a: {n: x for n, x in whole(*a).items() if n != lost})
        message = f"{lost} would be missing in the output.*Finished layers are kept in .*out.partial"
        with pytest.raises(RiaError, match=message):
            run(tiny("llama"), tmp_path / "out", text)
    work = tmp_path / "out.partial"
    assert len(list((work / "units").glob("layer-*.safetensors"))) == 2
    (work / "units" / "layer-00001.safetensors").unlink()  # the one that is not whole
    run(tiny("llama"), tmp_path / "out", text, Settings(resume=True))
    check_whole(tiny("llama"), tmp_path / "out")


def test_a_broken_tokenizer_configuration_shows_before_any_layer(tiny, text, tmp_path, monkeypatch):
    source = shutil.copytree(tiny("llama"), tmp_path / "in")
    monkeypatch.setattr(pipeline, "_tokens", lambda *_: pytest.fail("worked"))
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(RiaError, match="tokenizer_config.json: not readable as JSON"):
        run(source, tmp_path / "out", text)


def test_a_tensor_that_would_be_there_twice_is_an_error(tiny, text, tmp_path, monkeypatch):
    real = StreamedModel.names_outside_layers
    monkeypatch.setattr(StreamedModel, "names_outside_layers", lambda self: [*real(self), "model.layers.0.input_layernorm.weight"])
    with pytest.raises(RiaError, match="model.layers.0.input_layernorm.weight would be in the output twice"):
        run(tiny("llama"), tmp_path / "out", text)


def sharded(source: Path, folder: Path, second: dict, listed: tuple[str, ...]) -> Path:
    """The model as one shard, and a second one with `second`, of which the index names `listed`."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file(second, folder / "b.safetensors", metadata={"format": "pt"})
    placed = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors") | dict.fromkeys(listed, "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def test_a_tensor_in_two_shards(tiny, text, tmp_path):
    norm = load_file(tiny("llama") / "model.safetensors")["model.norm.weight"]
    shards = {"model.norm.weight": norm.clone(), "mtp.one.weight": torch.ones(3), "mtp.two.weight": torch.ones(4)}
    source = sharded(tiny("llama"), tmp_path / "in", shards, ("mtp.one.weight",))
    run(source, tmp_path / "out", text)
    assert {"mtp.one.weight", "mtp.two.weight"} <= set(Reader(tmp_path / "out").files)  # transformers reads both, too
    shards["model.norm.weight"][3] += 1
    source = sharded(tiny("llama"), tmp_path / "differing", shards, ("mtp.one.weight",))
    with pytest.raises(RiaError, match="b.safetensors: model.norm.weight is another tensor there than in a.safetensors"):
        run(source, tmp_path / "none", text)


def test_one_tensor_by_two_names(tiny, text, tmp_path):
    source = edited(tiny("llama"), tmp_path / "in", lambda t: t.update({"norm.weight": torch.ones(128)}))
    with pytest.raises(RiaError, match="norm.weight and model.norm.weight are both in the files"):
        run(source, tmp_path / "out", text)


def test_tied_weights_that_differ(tiny, text, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = edited(tiny("llama-mqa"), tmp_path / "in", change)
    run(source, tmp_path / "out", text)
    check_whole(source, tmp_path / "out")
    differing = edited(source, tmp_path / "differing", lambda t: put(t, "lm_head.weight"))
    with pytest.raises(RiaError, match="lm_head.weight and model.embed_tokens.weight are one tensor, but they differ"):
        run(differing, tmp_path / "none", text)
    untied = edited(differing, tmp_path / "untied", lambda t: None, tie_word_embeddings=False)
    run(untied, tmp_path / "two", text)
    check_whole(untied, tmp_path / "two")


def test_a_family_that_is_not_known_keeps_together_what_may_be_fused(tiny, text, tmp_path):
    report, warnings = run(tiny("lfm2"), tmp_path / "out", text, ignore=("layers.0.*w1",))
    assert report["dense"]["model.layers.0.feed_forward.w3"] == "may be served as one with feed_forward.w1"
    assert (
        "model.layers.0.feed_forward.w3 stays dense too: vLLM may serve it as one with model.layers.0.feed_forward.w1."
        in warnings
    )
    sparse = set(Reader(tmp_path / "out").sparse_names)
    assert {"model.layers.0.feed_forward.w2", "model.layers.1.feed_forward.w1", "model.layers.1.feed_forward.w3"} <= sparse
    assert not {"model.layers.0.feed_forward.w1", "model.layers.0.feed_forward.w3"} & sparse


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_most_sensitive_of_an_unknown_family_stay_together(fraction, tiny, text, tmp_path):
    run(tiny("qwen3.5"), tmp_path / "out", text, skip_sensitive=fraction)
    sparse = set(Reader(tmp_path / "out").sparse_names)
    for fused in (["linear_attn.in_proj_" + x for x in ("qkv", "z", "a", "b")], ["mlp.gate_proj", "mlp.up_proj"]):
        for layer in (0, 1):
            there = [f"model.layers.{layer}.{name}" in sparse for name in fused]
            assert len(set(there)) == 1, there


def test_linears_that_layers_share_stay_dense(tiny, text, tmp_path, monkeypatch):
    """As in Zamba, where a block is stored once, with the first of the layers that have it."""
    shared = {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}
    ties = {max(shared): min(shared), "lm_head.weight": "model.embed_tokens.weight"}
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", ties)
    source = edited(tiny("llama-mqa"), tmp_path / "in", lambda t: {n: x for n, x in t.items() if n != max(shared)})
    report, _ = run(source, tmp_path / "out", text, reconstruct="none")
    reader = check_whole(source, tmp_path / "out")
    assert {f"{name}.weight" for name, why in report["dense"].items() if "another layer's" in why} == shared
    assert not any("up_proj" in name or "gate_proj" in name for name in reader.sparse_names)
    check_export(source, reader, tmp_path / "dense", lambda name: name)


def test_a_linear_that_only_the_first_layer_uses(tiny, text, tmp_path, monkeypatch):
    def forward(self, x):
        return x if self.idle else real(self, x)

    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(LlamaMLP, "idle", property(lambda self: self is not LlamaMLP.first), raising=False)
    layers = StreamedModel.load_layer

    def load_layer(self, index):
        LlamaMLP.first = self.layers[0].mlp if index == 0 else None
        return layers(self, index)

    monkeypatch.setattr(LlamaMLP, "first", None, raising=False)
    monkeypatch.setattr(StreamedModel, "load_layer", load_layer)
    with pytest.raises(RiaError, match="model.layers.1.mlp.gate_proj: not used in this layer, as it is in the first"):
        run(tiny("llama"), tmp_path / "out", text)


def test_configurations_that_do_not_run(tiny, text, tmp_path):
    """transformers reads them, the weights fit, and its own forward pass fails."""
    source = edited(tiny("deepseek-v3"), tmp_path / "in", lambda t: None, head_dim=64)
    with pytest.raises(RiaError, match="transformers cannot run DeepseekV3ForCausalLM as config.json describes it"):
        run(source, tmp_path / "out", text)
    assert not list(tmp_path.glob("out*"))


def test_a_layer_that_does_not_run_by_itself_is_named(tiny, text, tmp_path, monkeypatch):
    def forward(self, *args, **kwargs):
        if self.self_attn.layer_idx == 1 and not self.input_layernorm.weight.is_meta:
            raise TypeError("needs more")
        return real(self, *args, **kwargs)

    real = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    message = "llama.*/dense: model.layers.1: transformers cannot run LlamaDecoderLayer by itself.*needs more"
    with pytest.raises(RiaError, match=message):
        run(tiny("llama"), tmp_path / "out", text)


def test_dtypes_of_quantized_models_are_refused(tiny, text, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.float8_e4m3fn, torch.int8):
        source = edited(tiny("llama"), tmp_path / str(dtype), lambda t, dtype=dtype: t.update({name: t[name].to(dtype)}))
        with pytest.raises(RiaError, match=f"{name} has dtype {str(dtype)[6:]}, as in a quantized model"):
            run(source, tmp_path / "out", text)


def change_config(**changes):
    return lambda folder: edit_json(folder / "config.json", changes)


def edit_json(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(**extra):
    def change(folder):
        tensors = load_file(folder / "model.safetensors") | extra
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


ODD = {
    "no weights for model.layers.2.": change_config(num_hidden_layers=3),
    "config.json: transformers cannot build this model": change_config(hidden_act="junk"),
    "no list of 0 decoder layers": change_config(num_hidden_layers=0),
    "mtp.x.compressed is in the files, a name as in a compressed": change_tensors(**{"mtp.x.compressed": torch.ones(4, 4)}),
    "model.layers.0.mlp.up_proj.bitmask is in": change_tensors(**{"model.layers.0.mlp.up_proj.bitmask": torch.ones(4)}),
    "transformers cannot read such a name": change_tensors(**{"model.layers.²": torch.ones(2)}),
    "mtp.x.weight: NaN": change_tensors(**{"mtp.x.weight": torch.full((4,), float("nan"))}),
}


@pytest.mark.parametrize("message", ODD)
def test_odd_folders_are_refused_before_any_work(message, tiny, text, tmp_path, monkeypatch):
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "in"))
    ODD[message](source)
    monkeypatch.setattr(pipeline, "_run", lambda *_: pytest.fail("work had begun"))
    with pytest.raises(RiaError, match=message):
        run(source, tmp_path / "out", text)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("wrong", ["one", "all"])
def test_experts_that_do_not_go_together(wrong, tiny, text, tmp_path):
    def change(tensors):
        for name in tensors:
            if name.startswith("model.layers.1.mlp.experts.1." if wrong == "one" else "model.layers.1.mlp.experts."):
                tensors[name] = tensors[name][:32].clone()

    cannot = "transformers cannot make model.layers.1.mlp.experts.* from the tensors"
    message = {"one": cannot, "all": "asks for"}[wrong]
    with pytest.raises(RiaError, match=f"in: .*model.layers.1.mlp.experts.*{message}" if wrong == "all" else message):
        run(edited(tiny("qwen3-moe"), tmp_path / "in", change), tmp_path / "out", text)


@pytest.mark.parametrize("place", ["files", "renamed"])
def test_errors_name_the_linear_as_its_file_does(place, tiny, text, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e38)
        return {put_away(name): tensor for name, tensor in tensors.items()} if place == "renamed" else None

    source = edited(tiny("qwen3.5"), tmp_path / "in", change)
    name = "model.language_model.layers.1.mlp.down_proj" if place == "renamed" else "model.layers.1.mlp.down_proj"
    with pytest.raises(RiaError, match=f"in: {name}: NaN or infinite values in its input.* in float32. Check"):
        run(source, tmp_path / "out", text)


def test_sampling_from_a_model_that_transformers_cannot_load(tiny, tmp_path, text, monkeypatch):
    def from_pretrained(*_, **__):
        raise ImportError("the package for its attention\nis not installed")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(RiaError, match="transformers cannot load the model .the package for its attention.\\.$"):
        run(tiny("llama"), tmp_path / "out", text, calibration="self")


def test_links_to_the_folder_and_to_its_files(tiny, text, tmp_path):
    """As in the hub's cache."""
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "in"))
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "link").symlink_to(source)
    run(tmp_path / "link", tmp_path / "out", text)
    check_whole(source, tmp_path / "out")


def test_other_dtypes_stay_as_they_are(tiny, text, tmp_path):
    """A norm in float32 beside bfloat16, and numbers of any kind that the model does not read."""

    def change(tensors):
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        return tensors | {"mtp.a": torch.ones(4, dtype=torch.float8_e4m3fn), "mtp.b": torch.ones(4, dtype=torch.int8)}

    source = edited(tiny("llama"), tmp_path / "in", change, dtype="bfloat16")
    run(source, tmp_path / "out", text)
    files, original = Reader(tmp_path / "out"), load_file(source / "model.safetensors")
    for name in files.dense_names:
        assert files.tensor(name).dtype == original[name].dtype
        assert torch.equal(files.tensor(name).view(torch.uint8), original[name].view(torch.uint8))

"""No tensor is lost: each one in the source is in the output once, or the run ends with an error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressing import check_complete, edited, logits, logits_of_pruned, run_small
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.streaming import StreamedModel

EXTRA = (
    "model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.mlp.experts.0.up_proj.weight", "mtp.fc.weight", "model.layers.10.mlp.up_proj.weight",
)  # fmt: skip


def test_layers_that_the_model_does_not_have_are_copied(tiny, text, tmp_path):
    """Such as DeepSeek-V3's and GLM-4.5's for multi-token prediction."""

    def change(tensors):
        tensors |= {name: torch.randn(64, 128) for name in EXTRA}
        tensors["model.layers.2.enorm.weight"] = torch.randn(128)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(16)

    source = edited(tiny("llama"), tmp_path / "in", change)
    report, warnings = run_small(source, tmp_path / "out", text)
    reader = Reader(tmp_path / "out")
    original = load_file(source / "model.safetensors")
    lost = {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert {*reader.dense_names, *(f"{name}.weight" for name in reader.sparse_names)} == set(original) - lost
    assert all(torch.equal(reader.tensor(name), original[name]) for name in reader.dense_names)
    assert list(reader.problems()) == [] and len(reader.sparse_names) == 14
    extra = [name.removesuffix(".weight") for name in EXTRA if "experts" not in name]
    assert all(reader.schema.ignored(name) and "no part of the model" in report["dense"][name] for name in extra)
    assert not reader.schema.ignored("model.layers.2.enorm")
    said = [text for text in warnings if "copied" in text]
    assert said == [
        "copied: model.layers.10.mlp.up_proj.weight and 5 more tensors, not part of LlamaForCausalLM as "
        "transformers builds it."
    ]
    assert torch.equal(logits(tmp_path / "out"), logits_of_pruned(tiny("llama"), reader))


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
    with pytest.raises(RiaError, match=f"{forgotten} would be in the output 0 times"):
        run_small(tiny("llama"), tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_would_be_written_twice_is_an_error(tiny, text, tmp_path, monkeypatch):
    real = StreamedModel.names_outside_layers
    monkeypatch.setattr(
        StreamedModel, "names_outside_layers", lambda self: [*real(self), "model.layers.0.input_layernorm.weight"]
    )
    with pytest.raises(RiaError, match="model.layers.0.input_layernorm.weight would be in the output 2 times"):
        run_small(tiny("llama"), tmp_path / "out", text)


def sharded(source: Path, folder: Path, second: dict, listed: tuple[str, ...]) -> Path:
    """The model as one shard, and a second one with `second`, of which the index names `listed`."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file(second, folder / "b.safetensors", metadata={"format": "pt"})
    placed = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors") | dict.fromkeys(
        listed, "b.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def test_one_tensor_by_two_names(tiny, text, tmp_path):
    source = edited(tiny("llama"), tmp_path / "in", lambda t: t.update({"norm.weight": torch.ones(128)}))
    with pytest.raises(RiaError, match="norm.weight and model.norm.weight are both in the files"):
        run_small(source, tmp_path / "out", text)


def test_tied_weights_that_differ(tiny, text, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = edited(tiny("llama-mqa"), tmp_path / "in", change)
    run_small(source, tmp_path / "out", text)
    check_complete(source, tmp_path / "out")

    def differ(tensors):
        tensors["lm_head.weight"][7] += 1

    differing = edited(source, tmp_path / "differing", differ)
    with pytest.raises(RiaError, match="lm_head.weight and model.embed_tokens.weight are one tensor, but they differ"):
        run_small(differing, tmp_path / "none", text)
    untied = edited(differing, tmp_path / "untied", lambda t: None, tie_word_embeddings=False)
    run_small(untied, tmp_path / "two", text)
    check_complete(untied, tmp_path / "two")


def test_links_to_the_folder_and_to_its_files(tiny, text, tmp_path):
    """As in the hub's cache."""
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "in"))
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "link").symlink_to(source)
    run_small(tmp_path / "link", tmp_path / "out", text)
    check_complete(source, tmp_path / "out")


def test_tensors_of_other_dtypes_are_unchanged(tiny, text, tmp_path):
    """A float32 norm in a bfloat16 model, and tensors of any dtype that the model does not use."""

    def change(tensors):
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        return tensors | {"mtp.a": torch.ones(4, dtype=torch.float8_e4m3fn), "mtp.b": torch.ones(4, dtype=torch.int8)}

    source = edited(tiny("llama"), tmp_path / "in", change, dtype="bfloat16")
    run_small(source, tmp_path / "out", text)
    files, original = Reader(tmp_path / "out"), load_file(source / "model.safetensors")
    for name in files.dense_names:
        assert files.tensor(name).dtype == original[name].dtype
        assert torch.equal(files.tensor(name).view(torch.uint8), original[name].view(torch.uint8))

"""Embedding and reranking models: decoders without a head, or with one that does not write text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressing import check_complete, edit_config, run_small
from families import config_of, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import ria_vllm  # noqa: F401  (from_pretrained reads compressed folders)
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.format.schema import PROOFS_FILE
from ria_vllm.offline.model.run.hf import load_model

TOKENS = torch.arange(2, 60)[None]
# As sentence-transformers saves an embedding model: a pooling module without weights, a projection, a norm.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def save(folder: Path, family: str, auto: type, **changes) -> Path:
    torch.manual_seed(0)
    auto.from_config(config_of(family, **changes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def outputs(folder: Path, auto: type) -> torch.Tensor:
    with torch.no_grad():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS)[0]


def embedder(folder: Path) -> Path:
    """A model in sentence-transformers' layout."""
    save(folder, "qwen3", AutoModel)
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"in_features": 128}')
    save_file({"linear.weight": torch.ones(8, 128)}, folder / "2_Dense" / "model.safetensors")
    (folder / "2_Dense" / "notes.py").write_text("print()")
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "config_sentence_transformers.json").write_text("{}")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("family", "auto", "kind"),
    [
        ("qwen3", AutoModel, "Qwen3Model"),
        ("gemma3", AutoModel, "Gemma3TextModel"),
        ("llama", AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
        ("qwen3", AutoModelForSequenceClassification, "Qwen3ForSequenceClassification"),
    ],
)
def test_models_that_write_no_text(family, auto, kind, text, tmp_path):
    bidirectional = {"use_bidirectional_attention": True} if family == "gemma3" else {}
    source = save(tmp_path / "in", family, auto, **bidirectional)
    report, _ = run_small(source, tmp_path / "out", text)
    reader = check_complete(source, tmp_path / "out")
    assert reader.config["architectures"] == [kind] and len(reader.sparse_names) == 14
    head = "score" if auto is AutoModelForSequenceClassification else None
    assert report["dense"] == ({head: "outside the decoder layers"} if head else {})
    assert all(name.startswith("model.layers." if head else "layers.") for name in reader.sparse_names)
    hand = Path(shutil.copytree(source, tmp_path / "hand"))
    pruned = {f"{name}.weight": reader.linear(name).dense() for name in reader.sparse_names}
    save_file(load_file(source / "model.safetensors") | pruned, hand / "model.safetensors", metadata={"format": "pt"})
    export_dense(reader, tmp_path / "dense", 1 << 40)
    expected = outputs(hand, auto)
    assert torch.equal(outputs(tmp_path / "dense", auto), expected)
    assert torch.equal(outputs(tmp_path / "out", auto), expected)
    assert not torch.allclose(outputs(source, auto), expected, atol=1e-3)


def test_the_layers_of_a_bidirectional_model_see_all_tokens(text, tmp_path):
    """The statistics are those of the model's own attention: with a causal one, other linears would be kept."""
    source = save(tmp_path / "in", "gemma3", AutoModel)
    run_small(source, tmp_path / "causal", text)
    edit_config(source, use_bidirectional_attention=True)
    run_small(source, tmp_path / "both", text)
    causal, both = (load_file(tmp_path / name / "model.safetensors") for name in ("causal", "both"))
    name = "layers.1.mlp.down_proj.bitmask"
    assert not torch.equal(causal[name], both[name])


def test_what_sentence_transformers_adds_comes_along(text, tmp_path):
    source = embedder(tmp_path / "in")
    run_small(source, tmp_path / "out", text)
    export_dense(Reader(tmp_path / "out"), tmp_path / "dense", 1 << 40)
    for folder in (tmp_path / "out", tmp_path / "dense"):
        nested = {path.relative_to(folder).as_posix() for path in folder.rglob("*/*") if path.is_file()} - {PROOFS_FILE}
        assert nested == {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
        for name in (*nested, "modules.json", "config_sentence_transformers.json"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert list(Reader(tmp_path / "out").problems()) == []


def pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def linked_file(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "1_Pooling" / "more.json").symlink_to(folder.parent / "secret.json")


def linked_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "config.json").write_text("{}")
    shutil.rmtree(folder / "1_Pooling")
    (folder / "1_Pooling").symlink_to(folder.parent / "elsewhere")


BAD = {
    "2_Dense: no safetensors here": pickled,
    "1_Pooling/more.json: a link that leads out": linked_file,
    "1_Pooling/config.json: a link that leads out": linked_folder,
}


@pytest.mark.parametrize("message", BAD)
def test_modules_that_cannot_come_along(message, text, tmp_path):
    source = embedder(tmp_path / "in")
    BAD[message](source)
    with pytest.raises(RiaError, match=message):
        run_small(source, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_they_neither_write_text_nor_have_a_perplexity(text, tmp_path):
    source = save(tmp_path / "in", "qwen3", AutoModel, tie_word_embeddings=True)
    no_logits = "the forward pass of a Qwen3Model gives no logits of tokens"
    with pytest.raises(RiaError, match=f"{no_logits}, which --data self needs. Give a text file"):
        run_small(source, tmp_path / "out", "self")
    with pytest.raises(RiaError, match=f"{no_logits}, so there is no perplexity"):
        load_model(str(source), torch.device("cpu"))

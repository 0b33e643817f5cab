"""Models that read images or sound: their text decoders are pruned whole, and everything else stays as it was."""

import json
from pathlib import Path

import pytest
import torch
from compressing import check_complete, edit_weights, linears_of, run_small
from safetensors.torch import load_file, save_file
from wrappers import PROCESSOR, VOCABULARY, save_wrapper

import ria_vllm  # noqa: F401  (from_pretrained reads compressed folders)
from ria_vllm.export import export_dense
from ria_vllm.offline.evaluation.evaluate import perplexity
from ria_vllm.offline.model.run.hf import load_model

TOKENS = torch.arange(2, 60)[None]
# These go through everything wherever tests run quickly: a vision tower, positions in three dimensions, and sound.
FAST = ("gemma3", "qwen2_5_vl", "qwen2_audio")
# The zoo and tests/offline/model/test_architecture.py have the others: their decoders are of the same types.
OWN = ("gemma4", "glm4v", "granite_speech", "lfm2_vl", "llama4", "llava", "ovis2", "qwen3_5")
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in OWN)]
# Family -> the linears of its decoder layers that stay dense, and why. All others are pruned: in every family at least
# LEAST of the weights in the matrices of its decoder layers.
LEFT_DENSE = {"llama4": {"feed_forward.router": "chooses experts"}}
LEAST = 0.95


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForMultimodalLM

    with torch.no_grad():
        return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_decoder_is_pruned_and_nothing_else(family, tiny_wrapper, text, tmp_path):
    source = tiny_wrapper(family)
    report, _ = run_small(source, tmp_path / "out", text)
    reader = check_complete(source, tmp_path / "out")  # dense tensors are equal bit by bit
    assert json.loads((source / "config.json").read_text())["architectures"] == reader.config["architectures"]
    assert all("layers." in name and "tower" not in name and "vision" not in name for name in reader.sparse_names)
    layers = {name.rpartition("layers.")[0] for name in reader.sparse_names}
    assert len(layers) == 1  # one list of layers
    prefix = f"{next(iter(layers))}layers."
    for name, why in report["dense"].items():
        if name.startswith(prefix):
            assert why == LEFT_DENSE.get(family, {}).get(name.removeprefix(prefix).partition(".")[2]), (name, why)
        elif name.endswith("lm_head"):
            assert why == "outside the decoder layers"
        else:
            assert why == "outside the text decoder", name
    towers = [name for name, tensor in load_file(source / "model.safetensors").items() if tensor.dim() == 2]
    towers = [name for name in towers if any(word in name for word in ("vision", "visual", "audio", "encoder."))]
    named = [name for name in towers if name.removesuffix(".weight") in report["dense"]]
    assert len(named) > 5, towers

    by_hand = load_file(source / "model.safetensors")
    parts = linears_of(by_hand)
    sizes = {name: tensor.numel() for name, tensor in parts.items() if name.startswith(prefix) and tensor.dim() == 2}
    assert sum(sizes[f"{name}.weight"] for name in reader.sparse_names) >= LEAST * sum(sizes.values())
    for name in reader.sparse_names:
        parts[f"{name}.weight"].copy_(reader.linear(name).dense())
    (tmp_path / "hand").mkdir()
    save_file(by_hand, tmp_path / "hand" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "hand" / "config.json").write_bytes((source / "config.json").read_bytes())
    expected = logits(tmp_path / "hand")
    export_dense(reader, tmp_path / "dense", 1 << 40)
    assert torch.equal(logits(tmp_path / "dense"), expected) and torch.equal(logits(tmp_path / "out"), expected)
    assert not torch.allclose(logits(source), expected, atol=1e-2)
    for name, content in PROCESSOR.items():
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "dense" / name).read_text() == content


def test_layers_that_read_keys_and_values_of_earlier_ones(text, tmp_path):
    """With the projections that the folders on the hub have in these layers, too, and that no one reads."""
    source = save_wrapper(
        tmp_path / "in", "gemma4", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2, hidden_size_per_layer_input=64, vocab_size_per_layer_input=VOCABULARY,
    )  # fmt: skip
    layers = "model.language_model.layers"
    read = [f"{layers}.{index}.self_attn.{kind}" for index in (0, 1) for kind in ("k_proj", "v_proj", "k_norm")]

    def with_unread(tensors):
        for name in read:
            unread = name.replace("layers.0", "layers.2").replace("layers.1", "layers.3")
            tensors[f"{unread}.weight"] = tensors[f"{name}.weight"] + 1

    edit_weights(source, with_unread)
    report, _ = run_small(source, tmp_path / "out", text)
    reader = check_complete(source, tmp_path / "out")
    assert {name.rpartition("layers.3.")[2] for name in report["linears"] if f"{layers}.3." in name} == {
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        "per_layer_input_gate", "per_layer_projection",
    }  # fmt: skip
    assert {name for name in report["dense"] if layers in name} == {
        f"{layers}.{index}.self_attn.{kind}" for index in (2, 3) for kind in ("k_proj", "v_proj")
    }
    export_dense(reader, tmp_path / "dense", 1 << 40)
    expected = logits(tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert not torch.allclose(logits(source), expected, atol=1e-2)


def test_perplexity_of_a_wrapper(tiny_wrapper, text, tmp_path):
    """Of a compressed folder as of the exported one; and as computed from transformers' logits."""
    reader_of = tiny_wrapper("gemma3")
    run_small(reader_of, tmp_path / "out", text)
    expected = torch.nn.functional.cross_entropy(logits(tmp_path / "out")[0, :-1], TOKENS[0, 1:]).exp()
    model = load_model(str(tmp_path / "out"), torch.device("cpu"))
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert perplexity(model, TOKENS[0], 64).perplexity == pytest.approx(float(expected), rel=1e-5)

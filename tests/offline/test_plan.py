"""Which linears a plan leaves dense."""

import pytest
import torch
from compressing import check_complete, check_export, edited, run_small
from transformers import LlamaForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.format.pattern import PATTERNS


def test_an_unknown_family_keeps_together_what_may_be_fused(tiny, text, tmp_path):
    report, warnings = run_small(tiny("lfm2"), tmp_path / "out", text, ignore=("layers.0.*w1",))
    assert report["dense"]["model.layers.0.feed_forward.w3"] == "may be served as one with feed_forward.w1"
    assert (
        "model.layers.0.feed_forward.w3 stays dense too: vLLM may fuse it with model.layers.0.feed_forward.w1."
        in warnings
    )
    sparse = set(Reader(tmp_path / "out").sparse_names)
    assert {
        "model.layers.0.feed_forward.w2",
        "model.layers.1.feed_forward.w1",
        "model.layers.1.feed_forward.w3",
    } <= sparse
    assert not {"model.layers.0.feed_forward.w1", "model.layers.0.feed_forward.w3"} & sparse


@pytest.mark.parametrize(("pattern", "ranks"), [("2:4", 8), ("8:16", 4)])
def test_a_fold_with_a_dense_producer_needs_blocks(pattern, ranks, tiny, text, tmp_path):
    """Its consumer gathers, and with tensor parallelism each rank has only a part of its input."""
    ignored = (".*layers.0.mlp.gate_proj", ".*layers.0.mlp.up_proj")
    run_small(tiny("llama"), tmp_path / "out", text, ignore=ignored, pattern=PATTERNS[pattern])
    reader = Reader(tmp_path / "out")
    inside = []
    for layer in (0, 1):
        p = reader.permutations[f"model.layers.{layer}.mlp.down_proj"]
        block = len(p) // ranks
        inside.append(bool((p // block == torch.arange(len(p)) // block).all()))
    assert inside == [True, False]


def test_linears_that_layers_share_stay_dense(tiny, text, tmp_path, monkeypatch):
    """As in Zamba, where a block that layers share is stored once, with the first of them."""
    separate = tiny("llama-mqa")  # saved before the class says that they share
    shared = {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}
    ties = {max(shared): min(shared), "lm_head.weight": "model.embed_tokens.weight"}
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", ties)
    source = edited(separate, tmp_path / "in", lambda t: {n: x for n, x in t.items() if n != max(shared)})
    report, _ = run_small(source, tmp_path / "out", text, reconstruct="none")
    reader = check_complete(source, tmp_path / "out")
    assert {f"{name}.weight" for name, why in report["dense"].items() if "another layer's" in why} == shared
    assert not any("up_proj" in name or "gate_proj" in name for name in reader.sparse_names)
    check_export(source, reader, tmp_path / "dense")

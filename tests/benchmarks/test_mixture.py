"""`python -m benchmarks.mixture`: the sizes that docs/lab/kernels-cpu.md names, and what `compress` makes of it."""

from pathlib import Path

import torch
from click.testing import CliRunner
from compressing import run_small
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import mixture
from benchmarks.mixture import Mixture, main
from ria_vllm.checkpoint.reader import Reader

SMALL = Mixture(
    layers=2, hidden=64, experts=4, intermediate=64, top_k=2, heads=4, kv_heads=2, head_dim=16, vocabulary=300
)


def test_as_many_weights_as_the_page_says():
    page = " ".join((Path(__file__).parents[2] / "docs" / "lab" / "kernels-cpu.md").read_text().split())
    assert "1.1 billion random bfloat16 weights, about 0.35 billion of them active" in page
    assert "(20 layers, hidden size 1024, 32 experts of 512, top 8)" in page
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Mixture().config())
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert abs(total / 1.1e9 - 1) < 0.02 and abs((total - experts * 24 // 32) / 0.35e9 - 1) < 0.02
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_all_but_routers_and_the_embedding_is_pruned(text, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "Mixture", lambda: SMALL)
    done = CliRunner().invoke(main, [str(tmp_path / "dense")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert len(tokenizer) == SMALL.vocabulary and tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    run_small(tmp_path / "dense", tmp_path / "out", text)
    reader = Reader(tmp_path / "out")
    assert list(reader.problems()) == []
    dense = {name: reader.tensor(name) for name in reader.dense_names}
    matrices = [name for name, tensor in dense.items() if tensor.dim() > 1]
    assert sorted(matrices) == ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.gate.weight" for i in range(2))]
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16}

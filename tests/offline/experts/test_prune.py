"""What is pruned of an expert, against the formula and a float64 product, with the tokens that its router sends."""

import shutil
from pathlib import Path

import pytest
import torch
from compressing import run_small
from moe import save_moe
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.run import compress

# Enough that each expert of layer 0 gets more tokens than it has channels, without four samples that are held out.
TOKENS = torch.randint(2, 258, (20, 128), generator=torch.Generator().manual_seed(1))
ATTENTION = (r"self_attn",)  # left dense, so that the experts of layer 0 read what they read in the dense model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return save_moe(tmp_path_factory.mktemp("mixtral") / "dense", "mixtral")


@pytest.fixture
def pruned(mixtral, text, tmp_path, monkeypatch):
    """Options -> (reader, report)."""

    def get(**options) -> tuple[Reader, dict]:
        monkeypatch.setattr(compress, "calibration_tokens", lambda *_: TOKENS)
        report, _ = run_small(mixtral, tmp_path / "out", text, seq_len=128, ignore=ATTENTION, **options)
        return Reader(tmp_path / "out"), report

    return get


@pytest.fixture(scope="module")
def routed(mixtral) -> tuple[torch.Tensor, torch.Tensor]:
    """What the experts of layer 0 read [tokens, width], and which of them each token goes to [tokens, 2]."""
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model(TOKENS)
    return seen[0]


def weights(mixtral: Path, expert: int) -> dict[str, torch.Tensor]:
    """The linears of an expert of layer 0, as mixtral's files call them."""
    experts = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).model.layers[0].mlp.experts
    gate, up = experts.gate_up_proj[expert].detach().chunk(2)
    return {"w1": gate, "w3": up, "w2": experts.down_proj[expert].detach()}


def ria_mask(weight: torch.Tensor, X: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """RIA's mask in the order p, by the paper's formula in float64."""
    W, norm = weight.double().abs(), X.double().norm(dim=0)
    S = (W / W.sum(0) + W / W.sum(1, keepdim=True)) * norm.sqrt()
    stored = S[:, p].view(len(S), -1, 4)
    keep = torch.zeros_like(stored).scatter_(2, stored.topk(2, dim=2).indices, 1.0).view(len(S), -1)
    return keep[:, p.argsort()].bool()


def test_each_expert_is_scored_by_the_tokens_that_its_router_sends(mixtral, pruned, routed):
    reader, report = pruned()
    X, choices = routed
    for expert in range(4):
        own, dense = X[(choices == expert).any(1)], weights(mixtral, expert)
        assert len(own) >= 192
        kept = {leaf: reader.dense(f"model.layers.0.block_sparse_moe.experts.{expert}.{leaf}") for leaf in dense}
        read = {"w1": own, "w3": own, "w2": silu(own @ kept["w1"].T) * (own @ kept["w3"].T)}
        for leaf, weight in dense.items():
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{leaf}"
            mask = ria_mask(weight, read[leaf], reader.permutations[name].long())
            agree = (mask == (kept[leaf] != 0)).float().mean()
            assert agree > 0.9995, (name, agree)  # a tie may be rounded the other way
            assert report["linears"][name]["tokens"] == len(own) and "borrowed" not in report["linears"][name]
            if leaf != "w2":  # all tokens of the layer would give another mask
                others = ria_mask(weight, X, reader.permutations[name].long())
                assert (others == (kept[leaf] != 0)).float().mean() < 0.999


def test_reconstruction_brings_an_expert_closer_to_its_dense_output(mixtral, pruned, routed):
    """On the tokens of layer 0, where what it reads is the same in both models, but for the four held-out samples."""
    X, choices = (one[: 16 * 128] for one in routed)
    errors = {}
    for reconstruct in ("none", "admm"):
        reader, _ = pruned(reconstruct=reconstruct)
        errors[reconstruct] = []
        for expert in range(4):
            own, dense = X[(choices == expert).any(1)].double(), weights(mixtral, expert)
            kept = {leaf: reader.dense(f"model.layers.0.block_sparse_moe.experts.{expert}.{leaf}") for leaf in dense}
            outputs = [
                (silu(own @ one["w1"].double().T) * (own @ one["w3"].double().T)) @ one["w2"].double().T
                for one in (dense, kept)
            ]
            errors[reconstruct].append(float((outputs[1] - outputs[0]).norm() / outputs[0].norm()))
        shutil.rmtree(reader.folder)
    for admm, none in zip(errors["admm"], errors["none"], strict=True):
        assert admm < 0.95 * none

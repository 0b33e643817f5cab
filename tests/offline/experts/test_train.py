"""Experts that are trained together, against sums over tokens and experts in float64."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressing import run_small
from moe import gpt_oss_gated, save_moe
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.calibration.activations import Activations
from ria_vllm.offline.experts import train
from ria_vllm.offline.experts.routing import Reads, RoutedTokens
from ria_vllm.offline.experts.store import RoutedExperts
from ria_vllm.offline.experts.train import ExpertsTrainer
from ria_vllm.offline.model.experts.files import ExpertFiles
from ria_vllm.offline.model.experts.run import run_one_by_one
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import compress
from ria_vllm.offline.sublayer import solve
from ria_vllm.offline.sublayer.pruned_linear import Pruned, packed
from ria_vllm.progress import Monitor

SIZES = (40, 24)  # of the chunks
EXPERTS = range(4)


def draw_weights(layout, seed: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{kind: torch.randn(layout.shape(kind), generator=draw) / 8 for kind in layout.kinds} for _ in EXPERTS]


def draw_reads(width: int, seed: int) -> Reads:
    """Expert 3 is chosen for one token only; expert number 9 means none."""
    draw, made = torch.Generator().manual_seed(seed), Reads(Activations())
    for size in SIZES:
        choices = torch.rand(size, 3, generator=draw).argsort(1)[:, :2]
        choices[3, 1], choices[5, 0] = (3, 9) if size == SIZES[0] else (choices[3, 1], 9)
        made.inputs.append(torch.randn(size, width, generator=draw))
        made.choices.append(choices.to(torch.int16))
        made.shares.append(torch.rand(size, 2, generator=draw) + 0.1)
    return made


@dataclass(frozen=True)
class Formula:
    """What experts output, in float64. bias: kind -> [experts, out]."""

    gated: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    bias: dict[str, torch.Tensor]

    def output(self, expert: int, weights: dict[str, torch.Tensor], X: torch.Tensor) -> torch.Tensor:
        def linear(kind: str, read: torch.Tensor) -> torch.Tensor:
            out = read @ weights[kind].double().T
            return out + self.bias[kind][expert].double() if self.bias else out

        return linear("down", self.gated(linear("gate", X.double()), linear("up", X.double())))

    def summed(self, weights, reads: Reads, index: int, without: int | None = None) -> torch.Tensor:
        """The output of the MoE layer for a chunk, token by token."""
        X, choices, shares = reads.inputs[index], reads.choices[index], reads.shares[index]
        out = torch.zeros(X.shape, dtype=torch.float64)
        for token in range(len(X)):
            for expert, share in zip(choices[token].tolist(), shares[token].tolist(), strict=True):
                if expert in EXPERTS and expert != without:
                    out[token] += share * self.output(expert, weights[expert], X[token])
        return out


SWIGLU = Formula(lambda gate, up: silu(gate) * up, {})


@pytest.fixture(params=["mixtral", "gpt_oss"])
def moe(request, tmp_path) -> SimpleNamespace:
    """Without and with biases."""
    config = AutoConfig.from_pretrained(save_moe(tmp_path / "model", request.param))
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    run_one_by_one(layer)
    experts, layout, formula = layer.mlp.experts, experts_modules(layer)["mlp.experts"], SWIGLU
    if layout.has_bias:
        draw = torch.Generator().manual_seed(0)
        bias = {kind: torch.randn(4, layout.shape(kind)[0], generator=draw) for kind in layout.kinds}
        experts.gate_up_proj_bias = torch.nn.Parameter(torch.stack([bias["gate"], bias["up"]], 2).flatten(1))
        experts.down_proj_bias = torch.nn.Parameter(bias["down"])
        formula = Formula(gpt_oss_gated, bias)
    return SimpleNamespace(
        layer=layer, experts=experts, layout=layout,
        files=ExpertFiles(layout, "mlp.experts", {kind: kind for kind in layout.kinds}),
        formula=formula, dense=draw_weights(layout, 1), pruned=draw_weights(layout, 2),
        reads=draw_reads(layout.width, 3), in_dense=draw_reads(layout.width, 4),
    )  # fmt: skip


def trainer_of(moe, enough: int = 8, follows_dense: bool = True) -> ExpertsTrainer:
    tokens = RoutedTokens(moe.reads, moe.in_dense if follows_dense else None, enough, 4)
    recipe = Recipe(reconstruct="block", compute_dtype="float32")
    model = SimpleNamespace(
        experts=[{"mlp.experts": moe.files}], layers=[moe.layer], folder=Path("folder"),
        from_files=lambda *_: moe.dense.__getitem__, device=torch.device("cpu"), dtype=torch.float32,
        stored_dtype=torch.float32,
    )  # fmt: skip
    experts = RoutedExperts(model, None, recipe, 0, "mlp.experts", tokens)
    return ExpertsTrainer(experts, Activations(), Monitor(shown=False))


def test_what_is_lacking_is_the_dense_models_output_less_the_own(moe):
    """Through another choice of the router, another input, and the experts that are pruned so far."""
    trainer = trainer_of(moe)
    now = list(moe.dense)
    for expert in (None, 0, 3, 2):
        if expert is not None:
            now[expert] = moe.pruned[expert]
            trainer.account(expert, {kind: weight.bfloat16() for kind, weight in now[expert].items()})
            now[expert] = {kind: weight.bfloat16() for kind, weight in now[expert].items()}
        for index in range(len(SIZES)):
            summed, lacking = moe.formula.summed, trainer.lacking[index]
            expected = summed(moe.dense, moe.in_dense, index) - summed(now, moe.reads, index)
            torch.testing.assert_close(lacking.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("follows_dense", [True, False])
def test_each_expert_is_trained_towards_what_the_others_leave(moe, follows_dense, monkeypatch):
    trainer = trainer_of(moe, follows_dense=follows_dense)
    in_dense, now = moe.in_dense if follows_dense else moe.reads, list(moe.dense)
    now[0] = moe.pruned[0]
    trainer.account(0, now[0])
    calls = []
    monkeypatch.setattr(train, "train_block", lambda *arguments: calls.append(arguments) or (2.0, 1.0))
    formula, reads = moe.formula, moe.reads
    for expert, leans in ((2, False), (3, True)):
        found = {
            moe.files.linear(expert, kind): Pruned(weight, packed(weight > 0), None, {})
            for kind, weight in moe.pruned[expert].items()
        }
        trained = trainer.train(expert, found)
        assert trained.keys() == found.keys() and all(linear.record["trained"] for linear in trained.values())
        forward, params, mask_of, inputs, targets, how, _ = calls.pop()
        assert params.keys() == set(moe.layout.kinds) and not how.relative
        assert all(torch.equal(mask_of(kind), weight > 0) for kind, weight in moe.pruned[expert].items())
        taken = 0
        for index in range(2):
            X, choices, shares = reads.inputs[index], reads.choices[index], reads.shares[index]
            wanted = formula.summed(moe.dense, in_dense, index)
            own = (choices == expert).any(1)
            chosen = trainer.tokens.chosen(index, expert)
            taken += int(chosen.sum()) - int(own.sum())
            norm = wanted.norm(dim=1, keepdim=True)
            norm = norm.clamp(min=0.1 * norm.square().median(0).values.sqrt())
            share = torch.where(own, (shares * (choices == expert)).sum(1), shares.mean(1))[:, None]
            others = wanted - formula.summed(now, reads, index, without=expert)
            # Tokens that it only leans on: its own output for them in the dense model.
            alone = share * formula.output(expert, moe.dense[expert], in_dense.inputs[index])
            goal = torch.where(own[:, None], others, alone)
            torch.testing.assert_close(targets[index].double(), (goal / norm)[chosen], rtol=1e-5, atol=1e-5)
            given, scale = inputs[index]
            assert torch.equal(given, X[chosen])
            mine = share * formula.output(expert, moe.pruned[expert], X) / norm
            torch.testing.assert_close(forward(given, scale).detach().double(), mine[chosen], rtol=1e-5, atol=1e-5)
        assert taken >= 7 if leans else taken == 0


@pytest.mark.parametrize("moe", ["mixtral"], indirect=True)
def test_outliers_do_not_make_the_other_tokens_count_less(moe):
    moe.in_dense.inputs[0][7] *= 1000
    moe.in_dense.choices[0][7] = torch.tensor([0, 1])
    trainer = trainer_of(moe)
    norms = moe.formula.summed(moe.dense, moe.in_dense, 0).norm(dim=1)
    assert norms.max() > 100 * norms.median()
    usual = norms > 0.2 * norms.median()
    assert usual.sum() > 30
    torch.testing.assert_close(trainer.norms[0].double()[usual], norms[usual], rtol=1e-4, atol=0)


@pytest.mark.parametrize("reconstruct", ["admm", "short", "block"])
def test_experts_have_admms_own_damping(text, tmp_path, monkeypatch, reconstruct):
    found, solver = Counter(), solve.admm_solver

    def counting(gram, damping, scales):
        found[damping] += 1
        return solver(gram, damping, scales=scales)

    monkeypatch.setattr(solve, "admm_solver", counting)
    source = save_moe(tmp_path / "dense", "llama4_text")
    ignored = ("layers.1", "shared_expert")
    run_small(source, tmp_path / "out", text, reconstruct=reconstruct, samples=16, seq_len=64, ignore=ignored)
    experts = AutoConfig.from_pretrained(source).num_local_experts
    attention = 2  # what q, k and v read, and what o reads
    assert found == Counter({0.2: 2 * experts}) + Counter({0.2 if reconstruct == "admm" else 2.0: attention})


def test_together_they_come_closer_to_the_dense_model_than_each_alone(text, tmp_path, monkeypatch):
    """On tokens that they were not trained on, where attention stays dense."""
    source = save_moe(tmp_path / "dense", "mixtral", num_experts_per_tok=4)
    tokens = torch.randint(2, 258, (136, 64), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(compress, "calibration_tokens", lambda *_: tokens[:128])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen = []
    model.model.layers[0].mlp.experts.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        model(tokens[128:])
    ((X, choices, shares), wanted), errors = seen[0], {}
    for name in ("together", "admm", "alone"):
        if name == "alone":
            monkeypatch.setattr(ExpertsTrainer, "account", lambda *_: None)
        reconstruct = "admm" if name == "admm" else "block"
        run_small(
            source, tmp_path / name, text, reconstruct=reconstruct, seq_len=64, ignore=("self_attn", "layers.1"),
            compute_dtype="float32",
        )  # fmt: skip
        reader = Reader(tmp_path / name)
        experts = "model.layers.0.block_sparse_moe.experts"
        leaves = {"gate": "w1", "up": "w3", "down": "w2"}
        pruned = [
            {kind: reader.dense(f"{experts}.{expert}.{leaf}") for kind, leaf in leaves.items()} for expert in EXPERTS
        ]
        reads = SimpleNamespace(inputs=[X], choices=[choices], shares=[shares])
        errors[name] = float((SWIGLU.summed(pruned, reads, 0) - wanted).norm() / wanted.norm())
    assert errors["together"] < 0.97 * errors["alone"] and errors["alone"] < errors["admm"]

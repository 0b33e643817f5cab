"""`--max-loss`. The oracle is transformers' own forward pass with the weights of some sublayers exchanged."""

import math
from itertools import combinations

import pytest
import torch
from click.testing import CliRunner
from compressing import interrupted_after_a_layer, run_small
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.inventory import take_inventory
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.commands import compress as command
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import budget, compress
from ria_vllm.offline.run.budget import Choice, choose
from ria_vllm.offline.run.compress import Settings
from ria_vllm.offline.run.kept import keeping
from ria_vllm.offline.run.plan import Kept
from ria_vllm.progress import Monitor

FIRST_MLP = (0, "mlp")
UNROTATED = {"reconstruct": "admm", "samples": 8}


def losses_of(dense, mixed, tokens):
    """Perplexity and KL, in float64."""
    with torch.no_grad():
        p, q = (model.double()(tokens).logits[:, :-1].log_softmax(-1) for model in (dense, mixed))
    likelihood = q.gather(2, tokens[:, 1:, None]).mean()
    return {"perplexity": math.exp(-likelihood), "kl": float((p.exp() * (p - q)).sum(-1).mean())}


def test_each_sublayer_alone_and_mixtures_of_them(tiny, text, tmp_path, monkeypatch):
    found = {}

    def chosen(alone, weights, measure, max_loss):
        found.update(alone=alone, weights=weights, mixed=measure(frozenset({FIRST_MLP, (1, "attention")})))
        return Choice(frozenset({FIRST_MLP}), {})

    def measured(model, streams, tokens, *others):
        found["tokens"] = torch.cat(list(tokens))
        return held_out_loss(model, streams, tokens, *others)

    held_out_loss = budget.held_out_loss
    monkeypatch.setattr(budget, "choose", chosen)
    monkeypatch.setattr(budget, "held_out_loss", measured)
    run_small(tiny("llama"), tmp_path / "all", text, **UNROTATED)
    report, _ = run_small(tiny("llama"), tmp_path / "out", text, max_loss=0.1, **UNROTATED)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "all").state_dict()
    assert set(found["alone"]) == {(index, name) for index in (0, 1) for name in ("attention", "mlp")}
    for units in [{unit} for unit in found["alone"]] + [{FIRST_MLP, (1, "attention")}]:
        dense, mixed = (AutoModelForCausalLM.from_pretrained(tiny("llama")) for _ in range(2))
        parts = [f"layers.{index}.{'mlp' if name == 'mlp' else 'self_attn'}." for index, name in units]
        changed = {name: w for name, w in pruned.items() if any(part in name for part in parts)}
        assert not mixed.load_state_dict(changed, strict=False).unexpected_keys
        want = losses_of(dense, mixed, found["tokens"])
        got = found["alone"][next(iter(units))] if len(units) == 1 else found["mixed"]
        assert got["kl"] == pytest.approx(want["kl"], rel=1e-3) and got["kl"] > 0
        assert got["perplexity"] == pytest.approx(want["perplexity"], rel=1e-4)
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(Reader(tmp_path / "out").sparse_names) == mlp == set(report["linears"])
    assert report["dense"]["model.layers.1.mlp.up_proj"] == "--max-loss"
    assert found["weights"][FIRST_MLP] == sum(math.prod(entry["shape"]) for entry in report["linears"].values())


def test_a_resumed_run_chooses_and_writes_the_same(tiny, text, tmp_path):
    """What is not to be pruned is no candidate, in either."""
    options = UNROTATED | {"weights": "int8", "activations": "int8", "max_loss": 10.0, "ignore": (r"1\.self_attn",)}
    report, _ = run_small(tiny("llama"), tmp_path / "whole", text, **options)
    with interrupted_after_a_layer():
        run_small(tiny("llama"), tmp_path / "out", text, **options)
    resumed, _ = run_small(tiny("llama"), tmp_path / "out", text, Settings(resume=True), **options)
    assert resumed["max_loss"] == report["max_loss"] and len(report["max_loss"]["sublayers"]) == 3
    run_small(tiny("llama"), tmp_path / "all", text, **(options | {"max_loss": None}))
    whole, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out", "all"))
    for other in others:
        assert other.keys() == whole.keys() and all(torch.equal(other[name], whole[name]) for name in whole)


@pytest.mark.parametrize("budget", [0.0001, 0.05, 0.3, 100.0])
def test_the_most_sublayers_within_the_budget(budget):
    losses = dict(zip([(i, "mlp") for i in range(7)], (0.5, 0.01, 0.02, 0.3, 0.001, 0.04, 0.08)))
    weights = dict(zip(losses, (10, 1, 10, 1, 1, 1, 2)))

    def measure(units):
        return {"perplexity": 20 * math.exp(sum(losses[unit] for unit in units)), "perplexity_dense": 20.0}

    found = choose({unit: {"kl": loss} for unit, loss in losses.items()}, weights, measure, budget)
    bearable = [
        set(units)
        for count in range(8)
        for units in combinations(losses, count)
        if sum(losses[unit] for unit in units) <= math.log1p(budget)
        and all(losses[a] / weights[a] <= losses[b] / weights[b] for a in units for b in set(losses) - set(units))
    ]
    assert found.pruned == max(bearable, key=len)


def test_all_dense_is_a_folder_too(tiny, text, tmp_path):
    """As the smallest budget has it."""
    run_small(tiny("llama"), tmp_path / "out", text, weights="int8", activations="int8", ignore=("layers",))
    reader = Reader(tmp_path / "out")
    assert reader.sparse_names == [] and len(reader.int8_names) == 15 and list(reader.problems()) == []
    assert take_inventory(reader).totals.ratio < 0.34
    model, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", tiny("llama")))
    tokens = torch.arange(2, 60)[None]
    assert losses_of(dense, model, tokens)["kl"] < 0.01


def test_what_it_cannot_do_is_refused(tiny, text, tmp_path, monkeypatch):
    with pytest.raises(RiaError, match="leave out --reconstruct none"):
        run_small(tiny("llama"), tmp_path / "out", text, max_loss=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "calibration_tokens", None)  # refused before any text is read
        for name, why in (("qwen3-moe", "layers with experts have"), ("gemma3n", "layers of this model read what")):
            with pytest.raises(RiaError, match=why):
                run_small(tiny(name), tmp_path / "out", text, reconstruct="admm", samples=8, max_loss=0.1)
    nothing = Choice(frozenset(), {1: {"perplexity": 10.5, "perplexity_dense": 10.0}})
    monkeypatch.setattr(budget, "choose", lambda *_: nothing)
    with pytest.raises(RiaError, match="every sublayer loses more; the one that costs least, 5.0%. Allow more"):
        run_small(tiny("llama"), tmp_path / "out", text, max_loss=0.01, **UNROTATED)
    with pytest.raises(RiaError, match="1 of 1 linears are 2:4 already"):
        keeping(Recipe(max_loss=0.1), Kept({0: frozenset({"up"})}, {0: frozenset()}), Monitor(shown=False))
    done = CliRunner().invoke(command, [str(tiny("llama")), "-o", str(tmp_path / "out"), "--max-loss", "much"])
    assert done.exit_code == 2 and "'much' is not a percentage, such as 5%." in done.output

"""`--max-loss` and `--min-speed`. The oracle of losses is transformers' own forward pass with the weights of some
sublayers exchanged, that of speeds the table's ratios."""

import json
import math
from itertools import combinations

import pytest
import torch
from click.testing import CliRunner
from compressing import run_small
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm import speed
from ria_vllm.checkpoint.inventory import take_inventory
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import PATTERNS, SCHEMES
from ria_vllm.offline.commands import compress as command
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import alone, budget, compress
from ria_vllm.offline.run.budget import Choice, choose, reach
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


@pytest.fixture
def found(monkeypatch):
    """The tokens that a budget's losses are measured on, once they are: those "of each" sublayer, and all. A test adds
    what it sees."""
    seen = {}

    def measured(model, streams, tokens, *others):
        seen["tokens"] = torch.cat(list(tokens))
        seen.setdefault("of each", seen["tokens"])
        return held_out_loss(model, streams, tokens, *others)

    held_out_loss = budget.held_out_loss
    monkeypatch.setattr(budget, "held_out_loss", measured)
    return seen


def test_each_sublayer_alone_and_mixtures_of_them(tiny, text, tmp_path, monkeypatch, found):
    def chosen(alone, weights, measure, max_loss):
        found.update(alone=alone, weights=weights, mixed=measure(frozenset({FIRST_MLP, (1, "attention")})))
        return Choice(frozenset({FIRST_MLP}), {})

    monkeypatch.setattr(budget, "choose", chosen)
    monkeypatch.setattr(alone, "TOKENS", 64)
    run_small(tiny("llama"), tmp_path / "all", text, **UNROTATED)
    report, _ = run_small(tiny("llama"), tmp_path / "out", text, max_loss=0.1, **UNROTATED)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "all").state_dict()
    assert set(found["alone"]) == {(index, name) for index in (0, 1) for name in ("attention", "mlp")}
    for units in [{unit} for unit in found["alone"]] + [{FIRST_MLP, (1, "attention")}]:
        dense, mixed = (AutoModelForCausalLM.from_pretrained(tiny("llama")) for _ in range(2))
        parts = [f"layers.{index}.{'mlp' if name == 'mlp' else 'self_attn'}." for index, name in units]
        changed = {name: w for name, w in pruned.items() if any(part in name for part in parts)}
        assert not mixed.load_state_dict(changed, strict=False).unexpected_keys
        want = losses_of(dense, mixed, found["of each" if len(units) == 1 else "tokens"])
        got = found["alone"][next(iter(units))] if len(units) == 1 else found["mixed"]
        assert got["kl"] == pytest.approx(want["kl"], rel=1e-3) and got["kl"] > 0
        assert got["perplexity"] == pytest.approx(want["perplexity"], rel=1e-4)
    assert torch.equal(found["of each"], found["tokens"][-2:]) and len(found["tokens"]) > 2
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(Reader(tmp_path / "out").sparse_names) == mlp == set(report["linears"])
    assert report["dense"]["model.layers.1.mlp.up_proj"] == "--max-loss"
    assert found["weights"][FIRST_MLP] == sum(math.prod(entry["shape"]) for entry in report["linears"].values())


def test_losses_are_of_integers(tiny, text, tmp_path, monkeypatch, found):
    """With everything pruned the loss is the folder's, as transformers reads it, but for its embeddings and its head;
    with nothing pruned that of the dense model in int8."""

    def chosen(alone, weights, measure, max_loss):
        found.update(all=measure(frozenset(alone)), none=measure(frozenset()))
        return Choice(frozenset(alone), {})

    monkeypatch.setattr(budget, "choose", chosen)
    options = {"reconstruct": "short", "samples": 8, "seq_len": 32, "max_loss": 9.0}
    run_small(tiny("llama"), tmp_path / "out", text, **options, **SCHEMES["W8A8"])
    dense, rounded = (AutoModelForCausalLM.from_pretrained(tiny("llama")) for _ in range(2))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for mine, theirs in (
        (pruned.get_input_embeddings(), dense.get_input_embeddings()),
        (pruned.lm_head, dense.lm_head),
    ):
        mine.weight.data = theirs.weight.data.to(mine.weight.dtype)
    want = losses_of(dense, pruned, found["tokens"])
    assert found["all"]["kl"] == pytest.approx(want["kl"], rel=1e-2)
    assert found["all"]["perplexity"] == pytest.approx(want["perplexity"], rel=4e-4)  # 9e-4 if no inputs were rounded
    for name, module in rounded.model.layers.named_modules():
        if name.endswith("_proj"):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    want = losses_of(dense, rounded, found["tokens"])
    assert found["none"]["kl"] == pytest.approx(want["kl"], rel=0.3) and 0 < want["kl"] < found["all"]["kl"] / 10


def test_what_loses_too_much_is_corrected_once(tiny, text, tmp_path, monkeypatch):
    """The weights are those of a run that chooses the same at once; an interruption changes nothing."""

    def run(name, chosen=None, settings=Settings(), **options):
        patch.setattr(budget, "choose", lambda alone, *_: Choice(frozenset(alone if chosen is None else chosen), {}))
        report, warnings = run_small(
            tiny("llama"), tmp_path / name, text, settings, **UNROTATED, **SCHEMES["W8A8"], **options
        )
        return report, warnings, load_file(tmp_path / name / "model.safetensors")

    def measured(*arguments):
        found = held_out_loss(*arguments)  # a random model may predict a text better when it is pruned
        return found | {"perplexity": found["perplexity_dense"] * math.exp(found["kl"])}

    def interrupted(*arguments):
        said.append(arguments)
        if len(said) == 5:  # of two layers, three times
            raise KeyboardInterrupt

    held_out_loss, said, patch = compress.held_out_loss, [], monkeypatch
    patch.setattr(compress, "held_out_loss", measured)
    loss = run("all", max_loss=9.0)[0]["held_out"]
    most, log = (
        loss["perplexity"] / loss["perplexity_dense"] - 1,
        math.log(loss["perplexity"] / loss["perplexity_dense"]),
    )
    report, warnings, tensors = run("out", max_loss=math.expm1(log * 0.7))
    sublayers = report["budget"]["sublayers"]
    order = sorted(sublayers, key=lambda name: sublayers[name]["kl"] / sublayers[name]["weights"])
    costs = [sum(sublayers[name]["kl"] for name in order[:count]) for count in range(len(order) + 1)]
    left = max(count for count, cost in enumerate(costs) if cost <= 0.7 * costs[-1])
    assert [name for name in order if sublayers[name]["pruned"]] == order[:left] and 0 < left < len(order)
    assert report["budget"]["corrected"] == pytest.approx(most, abs=1e-5)
    assert "before embeddings and the head were rounded" in report["verdict"]["quality"]
    lost = report["held_out"]["perplexity"] / report["held_out"]["perplexity_dense"] - 1
    assert any("is corrected once only" in warning for warning in warnings) == (lost > math.expm1(log * 0.7))
    units = [(int(name.split(".")[2]), name.split(".")[3]) for name in order[:left]]
    at_once, _, same = run("at once", units, max_loss=9.0)
    assert "corrected" not in at_once["budget"] and at_once["held_out"] == report["held_out"]
    with monkeypatch.context() as inner, pytest.raises(KeyboardInterrupt):
        inner.setattr(compress, "say_layer", interrupted)
        run("resumed", max_loss=math.expm1(log * 0.7))
    resumed, _, again = run("resumed", settings=Settings(resume=True), max_loss=math.expm1(log * 0.7))
    assert resumed["budget"] == report["budget"]
    for other in (same, again):
        assert other.keys() == tensors.keys() and all(torch.equal(other[name], tensors[name]) for name in tensors)


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


@pytest.mark.parametrize("least", [1.01, 1.3, 1.75, 2.0])
def test_the_fewest_sublayers_that_are_fast_enough(least):
    losses = dict(zip([(i, "mlp") for i in range(5)], (0.5, 0.01, 0.02, 0.3, 0.001)))
    weights = dict(zip(losses, (10, 1, 10, 4, 1)))

    def speed_of(units):  # twice as fast with all
        return 1 / (1 - sum(weights[unit] for unit in units) / 52)

    alone = {unit: {"kl": loss} for unit, loss in losses.items()}
    found = reach(alone, weights, lambda units: {"kl": len(units)}, speed_of, least)
    fast_enough = [
        set(units)
        for count in range(6)
        for units in combinations(losses, count)
        if speed_of(units) >= least
        and all(losses[a] / weights[a] <= losses[b] / weights[b] for a in units for b in set(losses) - set(units))
    ]
    assert found.pruned == min(fast_enough, key=len)
    assert found.measured == {len(found.pruned): {"kl": len(found.pruned)}}


# AVX-512 with BF16, one user: how many times as fast as in 16 bits pruned linears are,
# dense ones as the scheme stores them, and the head.
SPEEDS = {"W8A8": (4.2, 2.0, 2.0), "BF16": (2.4, 1.0, 1.0)}


@pytest.fixture
def avx512(monkeypatch):
    """With layers that take no time but for their linears: those of a tiny model are next to nothing."""
    monkeypatch.setattr(budget, "measured_here", lambda *_: "avx512_bf16")
    for name in ("LAYER", "LAYER_OF_USER"):
        monkeypatch.setattr(speed, name, 0.0)


@pytest.mark.parametrize("scheme", SPEEDS)
def test_as_fast_as_asked_and_no_faster(scheme, tiny, text, tmp_path, avx512):
    report, _ = run_small(tiny("llama"), tmp_path / "out", text, min_speed=1.2, **UNROTATED, **SCHEMES[scheme])
    sublayers, (pruned, dense, head) = report["budget"]["sublayers"], SPEEDS[scheme]
    order = sorted(sublayers, key=lambda name: sublayers[name]["kl"] / sublayers[name]["weights"])
    chosen = [name for name in order if sublayers[name]["pruned"]]
    config = AutoConfig.from_pretrained(tiny("llama"))

    def time(names):
        left = sum(sublayers[name]["weights"] for name in set(order) - set(names))
        fast = sum(sublayers[name]["weights"] for name in names)
        return fast / pruned + left / dense + config.vocab_size * config.hidden_size / head

    assert len(order) == 4 and chosen == order[: len(chosen)]
    assert time([]) / time(chosen) >= 1.2 > time([]) / time(chosen[:-1])
    assert report["budget"]["speed"] == pytest.approx(time([]) / time(chosen), abs=1e-3)
    assert list(report["budget"]["measured"]) == [str(len(chosen))]
    weights = sum(math.prod(entry["shape"]) for entry in report["linears"].values())
    assert weights == sum(sublayers[name]["weights"] for name in chosen)
    left = [name for name, why in report["dense"].items() if why == "--min-speed"]
    assert len(left) + len(report["linears"]) == 14 and set(report["linears"]).isdisjoint(left)
    assert set(report.get("dense_in_int8", ())) == (set(left) if scheme == "W8A8" else set())
    assert Reader(tmp_path / "out").sparse_names == sorted(report["linears"])


def test_what_min_speed_cannot_do_is_refused(tiny, text, tmp_path, monkeypatch, avx512):
    options = UNROTATED | SCHEMES["W8A8"] | {"min_speed": 50.0}
    with monkeypatch.context() as patch:
        patch.setattr(compress, "EachAlone", None)  # before anything is pruned
        with pytest.raises(RiaError, match=r"--min-speed 50: with everything pruned, .* is 1\.[0-9]+ times as fast"):
            run_small(tiny("llama"), tmp_path / "out", text, **options)
    monkeypatch.setattr(compress, "calibration_tokens", None)  # and these before any text is read
    with pytest.raises(RiaError, match="how fast 8:16 is in W8A8 on this cpu was not measured"):
        run_small(tiny("llama"), tmp_path / "out", text, pattern=PATTERNS["8:16"], **options)
    monkeypatch.setattr(budget, "measured_here", lambda *_: None)
    with pytest.raises(RiaError, match="--min-speed: how fast 2:4 is in W8A8 on this cpu was not measured"):
        run_small(tiny("llama"), tmp_path / "out", text, **options)
    with pytest.raises(RiaError, match="--max-loss and --min-speed: one follows from the other"):
        Recipe(max_loss=0.1, min_speed=1.3)
    done = CliRunner().invoke(command, [str(tiny("llama")), "-o", str(tmp_path / "out"), "--min-speed", "1"])
    assert str(done.exception) == "--min-speed 1.0: Input should be greater than 1."


def test_a_saved_budget_gives_way_to_another(tmp_path):
    path = tmp_path / "ria_report.json"
    path.write_text(json.dumps({"recipe": Recipe(max_loss=0.1, seed=7).dump("model")}))
    assert Recipe.saved(path)["max_loss"] == 0.1
    again = Recipe(**Recipe.saved(path, {"min_speed": 1.3}), min_speed=1.3)
    assert (again.budget, again.max_loss, again.seed) == ("--min-speed", None, 7)


def test_all_dense_is_a_folder_too(tiny, text, tmp_path):
    """As the smallest budget has it."""
    run_small(tiny("llama"), tmp_path / "out", text, weights="int8", activations="int8", ignore=("layers",))
    reader = Reader(tmp_path / "out")
    assert reader.sparse_names == [] and len(reader.int8_names) == 16 and list(reader.problems()) == []
    assert take_inventory(reader)["totals"]["ratio"] < 0.34
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

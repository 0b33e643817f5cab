"""Experts run one by one: what transformers computes, and the formula in float64."""

from copy import deepcopy

import pytest
import torch
from moe import KINDS, gpt_oss_gated, save_moe
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.model.experts.run import run_one_by_one, set_watcher, set_weights
from ria_vllm.offline.model.run.streaming import StreamedModel

TOKENS = torch.arange(2, 60)[None]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_from_the_files_they_compute_what_transformers_does(kind, tmp_path):
    """Each expert is read by itself, fused or apart in the files; the module's own parameters stay empty.

    The block around the experts is run, with its router: Llama 4 weights what each of its experts reads.
    """
    folder = save_moe(tmp_path / "dense", kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    streamed = StreamedModel(folder, AutoConfig.from_pretrained(folder), torch.device("cpu"))
    reads = []
    for index, layer in enumerate(model.model.layers):
        (path,) = experts_modules(layer)
        block = path.rpartition(".")[0] or path  # Gemma 4's are in the layer itself
        hook = layer.get_submodule(block).register_forward_hook(lambda m, args, out: reads.append((args, out)))
        with torch.no_grad():
            model(TOKENS, use_cache=False)
        hook.remove()
        args, expected = reads.pop()
        loaded = streamed.load_layer(index)
        assert loaded.get_submodule(path).down_proj.is_meta
        with torch.no_grad():
            torch.testing.assert_close(loaded.get_submodule(block)(*args), expected, rtol=1e-5, atol=1e-5)
        streamed.free_layer(index)


GATED = {"mixtral": lambda g, u: silu(g) * u, "gpt_oss": gpt_oss_gated, "nemotron_h": lambda _, u: u.relu() ** 2}


@pytest.mark.parametrize(("kind", "gated"), GATED.items())
def test_a_pruned_experts_product_in_float64(kind, gated, tmp_path):
    """With the routing fixed, and other weights than the module's own."""
    config = AutoConfig.from_pretrained(save_moe(tmp_path / "dense", kind))
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    run_one_by_one(layer)
    ((path, layout),) = experts_modules(layer).items()
    experts = layer.get_submodule(path)
    weights = [{k: normal(*layout.shape(k)) * (normal(*layout.shape(k)) > 0) for k in layout.kinds} for _ in range(4)]
    set_weights(experts, weights.__getitem__)
    bias = {"gate": normal(4, layout.inner), "up": normal(4, layout.inner), "down": normal(4, layout.width)}
    if layout.has_bias:
        experts.gate_up_proj_bias = torch.nn.Parameter(torch.stack([bias["gate"], bias["up"]], 2).flatten(1))
        experts.down_proj_bias = torch.nn.Parameter(bias["down"])
    else:
        bias = {name: torch.zeros_like(value) for name, value in bias.items()}
    X, choices, shares = normal(100, layout.width), torch.rand(100, 4, generator=draw).argsort(1)[:, :2], normal(100, 2)
    choices[choices == 2] = 3  # nothing goes to expert 2
    seen = []
    set_watcher(experts, lambda *args: seen.append(args))
    with torch.no_grad():
        found = experts(X, choices, shares)
    expected = torch.zeros_like(X)
    for token in range(100):
        for choice in range(2):
            e = int(choices[token, choice])
            read = {kind: weights[e][kind] @ X[token] + bias[kind][e] for kind in layout.first}
            down = weights[e]["down"] @ gated(read.get("gate"), read["up"]) + bias["down"][e]
            expected[token] += shares[token, choice] * down
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert seen[0][0] is X and seen[0][1] is choices


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama_4s_experts_read_weighted_tokens(top_k, tmp_path):
    """Its block in float64, with pruned weights, against the formula; what the experts are told they read."""
    folder = save_moe(tmp_path / "dense", "llama4_text", num_experts_per_tok=top_k)
    layer = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].double()
    run_one_by_one(layer)
    block, layout = layer.feed_forward, experts_modules(layer)["feed_forward.experts"]
    assert layout.transposed and not layout.interleaved and not layout.has_bias and layout.has_gate
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    weights = [{k: normal(*layout.shape(k)) * (normal(*layout.shape(k)) > 0) for k in layout.kinds} for _ in range(4)]
    set_weights(block.experts, weights.__getitem__)
    seen: list[tuple] = []
    set_watcher(block.experts, lambda *args: seen.append(args))
    X = normal(2, 50, layout.width)
    with torch.no_grad():
        found, logits = block(X)
        X = X.flatten(0, 1)
        expected, chosen = block.shared_expert(X), []
        factors = torch.sigmoid(logits.float()).double()  # transformers computes them in float32
        for token in range(100):
            scores = block.router.weight @ X[token]
            torch.testing.assert_close(logits[token], scores)
            for expert in scores.argsort(descending=True)[:top_k].tolist():
                read = X[token] * factors[token, expert]
                gate, up = (weights[expert][kind] @ read for kind in ("gate", "up"))
                expected[token] += weights[expert]["down"] @ (silu(gate) * up)
                chosen.append((expert, read))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ((reads, choices),) = seen
    assert choices.shape == (100 * top_k, 1)
    for expert in range(4):
        own = reads[choices[:, 0] == expert]
        wanted = torch.stack([read for number, read in chosen if number == expert])
        assert len(own) == len(wanted)
        torch.testing.assert_close(own.sort(0).values, wanted.sort(0).values, rtol=1e-12, atol=1e-12)


def test_a_copy_of_a_layer_runs_its_own_experts(tmp_path):
    layer = AutoModelForCausalLM.from_pretrained(save_moe(tmp_path / "dense", "llama4_text")).model.layers[0]
    X = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer.feed_forward(X)[0]
        run_one_by_one(layer)
        copied = deepcopy(layer)
        layer.feed_forward.experts.down_proj.zero_()
        torch.testing.assert_close(copied.feed_forward(X)[0], expected, rtol=1e-5, atol=1e-5)

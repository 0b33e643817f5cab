"""Experts run one by one: what transformers computes, and the formula in float64."""

from pathlib import Path

import pytest
import torch
from moe import KINDS, gpt_oss_gated, save_moe
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.offline.model.experts import expert_of, experts_modules, other_experts
from ria_vllm.offline.model.run_experts import IMPLEMENTATION, own_weights, run_one_by_one, set_watcher, set_weights
from ria_vllm.offline.model.streaming import StreamedModel

TOKENS = torch.arange(2, 60)[None]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_from_the_files_they_compute_what_transformers_does(kind, tmp_path):
    """Each expert is read by itself, fused or apart in the files; the module's own parameters stay empty."""
    folder = save_moe(tmp_path / "dense", kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    streamed = StreamedModel(folder, AutoConfig.from_pretrained(folder), torch.device("cpu"))
    reads = []
    for index, layer in enumerate(model.model.layers):
        (path,) = experts_modules(layer)
        hook = layer.get_submodule(path).register_forward_hook(lambda m, args, out: reads.append((args, out)))
        with torch.no_grad():
            model(TOKENS, use_cache=False)
        hook.remove()
        args, expected = reads.pop()
        experts = streamed.load_layer(index).get_submodule(path)
        assert experts.down_proj.is_meta and experts.config._experts_implementation == IMPLEMENTATION
        torch.testing.assert_close(experts(*args), expected, rtol=1e-5, atol=1e-5)
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
    assert seen[0][0] is X and seen[0][1] is choices and seen[0][2] is shares


@pytest.mark.parametrize(("kind", "interleaved"), [("mixtral", False), ("gpt_oss", True)])
def test_an_experts_linears_in_its_modules_parameters(kind, interleaved, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(save_moe(tmp_path / "dense", kind), dtype=torch.float32)
    layer = model.model.layers[0]
    run_one_by_one(layer)
    experts, layout = layer.mlp.experts, experts_modules(layer)["mlp.experts"]
    assert layout.interleaved == layout.transposed == layout.has_bias == interleaved
    found = own_weights(experts)(3)
    whole = experts.gate_up_proj[3].T if interleaved else experts.gate_up_proj[3]
    for kind_of, rows in zip(("gate", "up"), (slice(0, None, 2), slice(1, None, 2)), strict=True):
        half = slice(None, layout.inner) if kind_of == "gate" else slice(layout.inner, None)
        assert torch.equal(found[kind_of], whole[rows if interleaved else half])
        assert found[kind_of].shape == layout.shape(kind_of)
    outputs = [torch.arange(layout.inner), -torch.arange(layout.inner)]
    joined = layout.joined(outputs)
    assert torch.equal(joined[::2] if interleaved else joined[: layout.inner], outputs[0])


def test_names_of_experts():
    assert expert_of("mlp.experts.12.down_proj") == ("mlp.experts", 12, "down")
    assert expert_of("mlp.shared_expert.down_proj") is None and expert_of("mlp.experts") is None


def test_experts_that_are_run_in_another_way_are_named():
    config = AutoConfig.for_model("llama4_text", hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[1]
    assert experts_modules(layer) == {}
    assert "Llama4TextExperts" in other_experts(layer, 64)["feed_forward.experts"]

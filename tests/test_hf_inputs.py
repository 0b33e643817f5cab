"""Inputs that transformers rounds to int8. The oracle rounds token by token and multiplies in float64."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from compressing import TOKENS, run_small
from families import make_model, text  # noqa: F401
from moe import save_moe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from wrappers import tiny_wrapper  # noqa: F401

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.format.token_rounding import round_tokens
from ria_vllm.hf.inputs import round_inputs
from ria_vllm.offline.model.run.hf import load_model

INT4 = {"weights": "int4", "group_size": 32, "activations": "int8"}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each token of x, float64 [tokens, K]."""
    found = []
    for token in x.reshape(-1, x.shape[-1]).float().numpy():
        largest = np.abs(token).max()
        integers = np.rint(token * (np.float32(127) / largest)) if largest else token
        found.append(integers.astype(np.float64) * np.float64(largest / np.float32(127)))
    return torch.from_numpy(np.stack(found))


def recorded(model, kind):
    """Name -> (what modules of a kind read before any other hook, what they give), in one forward pass."""
    read, given = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda _, args, n=name: read.update({n: args}), prepend=True)
            module.register_forward_hook(lambda _, args, y, n=name: given.update({n: y}))
    with torch.no_grad():
        model(TOKENS)
    return {name: (read[name], given[name]) for name in read}


@pytest.fixture(scope="module")
def folder(make_model, text, tmp_path_factory):  # noqa: F811
    """A Llama with biases, permuted; one linear is left dense."""
    work = tmp_path_factory.mktemp("inputs")
    source = make_model(work / "dense", "llama-mha")
    run_small(source, work / "out", text, ignore=("layers.1.self_attn.o_proj",), **INT4)
    assert Reader(work / "out").permuted_names
    return work / "out"


def test_all_linears_but_the_head_round_each_token(folder):
    reader, model = Reader(folder), AutoModelForCausalLM.from_pretrained(folder)
    layers = recorded(model, torch.nn.Linear)
    assert {"lm_head", "model.layers.1.self_attn.o_proj"} == layers.keys() - set(reader.sparse_names)
    for name, ((x,), y) in layers.items():
        module, x = model.get_submodule(name), x[0]
        weight = reader.dense_tensors()[f"{name}.weight"]().double()
        exact, off = (read @ weight.T for read in (x.double(), rounded(x)))
        expected = (exact if name == "lm_head" else off) + (0 if module.bias is None else module.bias.detach().double())
        torch.testing.assert_close(y[0].double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(exact, off, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_they_are_rounded_to_the_dtype_that_is_asked_for(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 8))
    x = torch.randn(3, 64)
    wanted = model[1](torch.nn.functional.linear(round_tokens(x, dtype), model[0].weight, model[0].bias))
    other = model(x)
    round_inputs(model, ["0.weight"], "here", dtype)
    assert torch.equal(model(x), wanted) and not torch.allclose(other, wanted, atol=1e-4)


def test_eval_measures_the_rounded_model(folder, tmp_path):
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
        assert torch.equal(load_model(str(folder), torch.device("cpu"))(TOKENS).logits, found)
        export_dense(Reader(folder), tmp_path / "dense", 1 << 40)
        unrounded = load_model(str(tmp_path / "dense"), torch.device("cpu"))(TOKENS).logits
    assert not torch.allclose(found, unrounded, atol=1e-3)
    torch.testing.assert_close(found, unrounded, rtol=0, atol=0.5 * float(unrounded.std()))


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_5", "llava", "llama4"])
def test_wrappers_round_in_their_text_decoder_alone(family, tiny_wrapper, text, tmp_path):  # noqa: F811
    run_small(tiny_wrapper(family), tmp_path / "out", text, **INT4)
    model = load_model(str(tmp_path / "out"), torch.device("cpu"))
    # Mixers, which have A_log, only watch their linears.
    modules = model.named_modules()
    hooked = [name for name, module in modules if module._forward_pre_hooks and not hasattr(module, "A_log")]
    in_experts = len({n.partition(".experts.")[0] for n in Reader(tmp_path / "out").sparse_names if ".experts." in n})
    plain = [name for name in Reader(tmp_path / "out").sparse_names if ".experts." not in name]
    assert len(hooked) == len(plain) + in_experts and not any("vision" in name for name in hooked)
    other = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found, want = (one(TOKENS).logits for one in (other, model))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_copies_round_and_saved_models_do_not(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    copy = deepcopy(model)
    del model.model.layers[1:]
    with torch.no_grad():
        assert torch.equal(copy(TOKENS).logits, AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits)
        assert not torch.equal(copy(TOKENS).logits, model(TOKENS).logits)
        copy.save_pretrained(tmp_path / "saved")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in copy.state_dict().items())
        assert not torch.equal(copy(TOKENS).logits, saved(TOKENS).logits)


def test_gradients_reach_what_comes_before(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model(TOKENS).logits.sum().backward()
    weights = [model.model.embed_tokens.weight, *(layer.mlp.up_proj.weight for layer in model.model.layers)]
    assert all(bool(weight.grad.abs().sum() > 0) for weight in weights)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_experts_round_both_of_their_inputs(kind, text, tmp_path):  # noqa: F811
    hybrid = {
        "layers_block_type": ["moe", "attention"], "num_hidden_layers": 2, "moe_shared_expert_intermediate_size": 64,
        "n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16,
    }  # fmt: skip
    source = save_moe(tmp_path / "dense", kind, **(hybrid if kind == "nemotron_h" else {}))
    run_small(source, tmp_path / "out", text, **INT4)
    reader, model = Reader(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    experts = type(next(m for n, m in model.named_modules() if n.rpartition(".")[2] == "experts"))
    found = recorded(model, experts)
    modules = {name.partition(".experts.")[0] for name in reader.sparse_names if ".experts." in name}
    assert len(found) == len(modules) > 0
    for name, ((x, ids, shares), y) in found.items():
        module = model.get_submodule(name)
        expected = torch.zeros_like(x, dtype=torch.float64)
        for expert in range(module.num_experts):
            weights = [p.detach()[expert].double() for n, p in module.named_parameters() if not n.endswith("_bias")]
            first, down = [weight.T if module.is_transposed else weight for weight in weights]
            biases = [p.detach()[expert].double() for n, p in module.named_parameters() if n.endswith("_bias")]
            first_bias, down_bias = biases or (0, 0)
            inner = rounded(x) @ first.T + first_bias
            if kind == "gpt_oss":
                gate, up = inner[:, ::2].clamp(max=7), inner[:, 1::2].clamp(-7, 7)
                inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            elif kind == "nemotron_h":
                inner = inner.clamp(min=0) ** 2
            else:
                gate, up = inner.chunk(2, dim=1)
                inner = torch.nn.functional.silu(gate) * up
            share = (shares.double() * (ids == expert)).sum(1, keepdim=True)
            expected += share * (rounded(inner) @ down.T + down_bias)
        # Numbers of `inner` that lie on the edge of two integers may go to either, those of large tokens a larger step.
        step = float(expected.std()) / 64
        assert (y.double() - expected).abs().max() < step and (y.double() - expected).abs().median() < 1e-2 * step, name
    with torch.no_grad():
        want = load_model(str(tmp_path / "out"), torch.device("cpu"))(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logits, want)
        torch.testing.assert_close(eager(TOKENS).logits, want)


def test_llama_4s_experts_round_weighted_tokens_and_what_down_reads(text, tmp_path):  # noqa: F811
    run_small(save_moe(tmp_path / "dense", "llama4_text"), tmp_path / "out", text, **INT4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found = recorded(model, type(model.model.layers[0].feed_forward.experts))
    assert len(found) == 2
    for name, ((x,), y) in found.items():
        module = model.get_submodule(name)
        assert int((x != 0).any(1).sum()) == TOKENS.numel()  # one expert reads each
        expected = []
        for expert, read in enumerate(x.double().chunk(4)):
            gate, up = (rounded(read) @ module.gate_up_proj[expert].detach().double()).chunk(2, dim=1)
            inner = torch.nn.functional.silu(gate) * up
            expected.append(rounded(inner) @ module.down_proj[expert].detach().double())
        off = (y.double() - torch.cat(expected)).abs()
        # Numbers of `inner` that lie on the edge of two integers may go to either.
        step = float(torch.cat(expected).std()) / 127
        assert off.max() < step and off.median() < 1e-2 * step
    copy = deepcopy(model)
    with torch.no_grad():
        logits = model(TOKENS).logits
        model.model.layers[0].feed_forward.experts.down_proj.zero_()
        torch.testing.assert_close(copy(TOKENS).logits, logits)


def test_other_modules_are_refused_by_name(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(RiaError, match="here: model.embed_tokens.weight belongs to a Embedding.*ria-vllm export"):
        round_inputs(model, ["model.embed_tokens.weight"], "here", torch.int8)


@pytest.mark.parametrize("weights", [["down_proj"], ["gate_up_proj"], ["up_proj", "down_proj"]], ids=str)
def test_experts_of_which_only_some_are_pruned_are_refused(weights, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_moe(tmp_path, "qwen3_moe"))
    experts = "model.layers.1.mlp.experts"
    model.get_submodule(experts).up_proj = torch.nn.Parameter(torch.ones(4, 128, 64))
    with pytest.raises(RiaError, match=f"here: {experts}.{min(weights)} belongs to a Qwen3MoeExperts.*ria-vllm export"):
        round_inputs(model, [f"{experts}.{name}" for name in weights], "here", torch.int8)


def test_inputs_by_keyword():
    x = torch.randn(3, 64)
    for model, call in (
        (torch.nn.ModuleDict({"linear": torch.nn.Linear(64, 8)}), {"input": x}),
        (torch.nn.ModuleDict({"linear": Other(64, 8)}), {"scale": torch.tensor(2.0), "hidden_states": x}),
    ):
        exact = model["linear"](**call)
        round_inputs(model, ["linear.weight"], "here", torch.int8)
        expected = rounded(x) @ model["linear"].weight.detach().double().T + model["linear"].bias.detach().double()
        expected = expected * float(call.get("scale", 1))
        torch.testing.assert_close(model["linear"](**call).double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(exact, model["linear"](**call), atol=1e-3)
    with pytest.raises(TypeError, match="Other: the input is neither"):
        model["linear"](scale=x)


class Other(torch.nn.Linear):
    def forward(self, scale, hidden_states):
        return super().forward(hidden_states) * scale


class Adapted(torch.nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight, self.bias = base_layer.weight, base_layer.bias

    def forward(self, x):
        return self.base_layer(x)


def test_mixers_whose_fused_kernel_takes_the_weight_are_refused_in_training(make_model, tmp_path, monkeypatch):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", "nemotron-h")).eval()
    name = next(name for name, _ in model.named_modules() if name.endswith(".out_proj"))
    with torch.no_grad():
        exact = model(TOKENS).logits
    round_inputs(model, [f"{name}.weight"], "here", torch.int8)
    model = deepcopy(model)
    found = recorded(model, torch.nn.Linear)[name]
    weight = model.get_submodule(name).weight.detach().double()
    torch.testing.assert_close(found[1].double()[0], rounded(found[0][0]) @ weight.T, rtol=1e-4, atol=1e-5)
    assert not torch.equal(exact, model(TOKENS).logits)
    model.train()
    assert model(TOKENS, use_cache=False).logits.isfinite().all()

    def fused(*args, outproj_weight, **kwargs):
        return torch.zeros(1, TOKENS.shape[1], len(outproj_weight))

    parent, _, child = name.rpartition(".")
    adapted = deepcopy(model)  # as PEFT puts an adapter around a linear
    setattr(adapted.get_submodule(parent), child, Adapted(adapted.get_submodule(name)))
    torch.testing.assert_close(adapted(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)

    monkeypatch.setattr("transformers.models.nemotron_h.modeling_nemotron_h.mamba2_split_conv1d_scan_combined", fused)
    with pytest.raises(RiaError, match=f"here: {name}: NemotronHMamba2Mixer multiplies with its weight"):
        model(TOKENS, use_cache=False)
    with torch.no_grad():
        model.eval()(TOKENS)

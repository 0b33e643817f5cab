"""Statistics against plain forward hooks on the whole model in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.calibration.data import from_text
from ria_vllm.offline.calibration.sublayer import LEAST_GAIN
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.experiments import survey
from ria_vllm.offline.model.topology import Group, Sublayer, Topology
from ria_vllm.offline.pruning.drift import InputDrift, OutputDrift
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "opt-postnorm")
# The first module that reads the stream after attention: the first of these that a layer has.
AFTER_ATTENTION = ("final_layer_norm", "pre_feedforward_layernorm", "post_attention_layernorm")


def pruned_in_full(source: Path, compressed: Path, folder: Path):
    """The pruned model as transformers loads it, in float64."""
    reader = Reader(compressed)
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"{name}.weight": reader.linear(name).dense().contiguous() for name in reader.sparse_names}
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    attention = "eager" if "gemma2" in source.parent.name else None
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).double().eval()


def seen_by(model, tokens, names):
    """What the linears `names` read, and the residual stream before, between and after each layer's sublayers."""
    inputs, streams = {}, {}
    for name in names:
        hook = lambda _, args, name=name: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    layers = model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers
    for index, layer in enumerate(layers):
        between = next(getattr(layer, name) for name in AFTER_ATTENTION if hasattr(layer, name))
        if not getattr(layer, "do_layer_norm_before", True):
            between = layer.self_attn_layer_norm
        for key, module in (("before", layer), ("between", between)):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, at=(index, key): streams.__setitem__(
                    at, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
        layer.register_forward_hook(
            lambda _, args, out, at=(index, "after"): streams.__setitem__(at, out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(input_ids=tokens)
    return inputs, {at: stream.reshape(-1, stream.shape[-1]) for at, stream in streams.items()}


def norm_after(model, name):
    """Gemma's norm between the output of this linear and the residual stream; None: there is none."""
    layer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    kind = {"o_proj": "post_attention_layernorm", "down_proj": "post_feedforward_layernorm"}.get(
        name.rpartition(".")[2]
    )
    return kind and layer.get_submodule(kind)


def rms_factors(linear, X):
    """What an RMS norm after the linear multiplies each token by [tokens, 1]."""
    return linear(X).detach().square().mean(1, keepdim=True).rsqrt()


def statistics_of(source, text, out, monkeypatch):
    """Compress `source`; the statistics of each group, by its first linear, and the calibration tokens."""
    found = {}

    def keeping(self, number, groups, with_gram, **rest):
        statistics = gather(self, number, groups, with_gram, **rest)
        names = [self.place(group.linears[0]).rpartition(" ")[2] for group in groups]
        found.update(zip(names, statistics, strict=True))
        return statistics

    gather = SublayerPass.statistics
    monkeypatch.setattr(SublayerPass, "statistics", keeping)
    # 5 samples of 60 tokens make two chunks of unequal size.
    monkeypatch.setattr(Recipe, "chunk_tokens", 180)
    recipe = Recipe(calibration=str(text), samples=5, seq_len=60, reconstruct="admm")
    compress(str(source), out, recipe, Settings(), Monitor(shown=False))
    return found, from_text(str(text), AutoTokenizer.from_pretrained(source), 5, 60, 0)


def assert_drift(drift, weight, X, missing, size, name):
    """Check the drift of a linear that reads X and whose output, of norm `size`, lacks `missing`."""
    assert (drift.cross_term(weight) - missing.T @ X).norm() <= 1e-4 * size * X.norm(), name
    assert abs(drift.squared_residual(weight) - missing.square().sum()) <= 1e-4 * size**2, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_sees_what_the_pruned_layers_before_it_produce(family, tiny, text, tmp_path, monkeypatch):
    found, tokens = statistics_of(tiny(family), text, tmp_path / "out", monkeypatch)
    attention = "eager" if family == "gemma2" else None
    dense = AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation=attention).double().eval()
    model = pruned_in_full(tiny(family), tmp_path / "out", tmp_path / "full")
    (expected, streams), (undrifted, goal) = (seen_by(one, tokens, found) for one in (model, dense))
    assert len(found) == 8
    for name, X in expected.items():
        linear = dense.get_submodule(name).requires_grad_(False)
        index = int(next(part for part in name.split(".") if part.isdigit()))
        first, last = ("before", "between") if "self_attn" in name else ("between", "after")
        norm = norm_after(dense, name) if "gemma" in family else None
        if norm is not None:  # it divides each token of the output by its RMS
            gains = (1 + norm.weight).detach()
            goal_of_norm = goal[index, last] - streams[index, first] - norm(linear(X)).detach()
            X = X * rms_factors(linear, X)
        gram = X.T @ X
        scale = gram.diagonal().sqrt()
        assert ((found[name].gram.dense() - gram).abs() <= 1e-4 * scale[:, None] * scale + 1e-6).all(), name
        torch.testing.assert_close(found[name].norm.double(), scale, rtol=1e-4, atol=1e-5)
        drift = found[name].drift
        first_of_mlp = name.endswith(("gate_proj", "gate_up_proj", "fc1"))
        if name.endswith(("q_proj", "qkv_proj")) or first_of_mlp:
            missing = (undrifted[name] - X) @ linear.weight.T
        elif norm is not None:
            missing = goal_of_norm * gains / (gains**2 + (LEAST_GAIN * gains.abs().median()) ** 2)
        elif family == "opt-postnorm" and name.endswith("fc2"):  # the norm comes after the sum
            assert drift is None
            continue
        else:
            missing = goal[index, last] - streams[index, first] - linear(X)
        size = linear(X).norm()
        assert_drift(drift, linear.weight, X, missing, size, name)
        no_drift_yet = index == 0 and name.endswith(("q_proj", "qkv_proj"))
        assert no_drift_yet or missing.norm() > 0.01 * size, name


def test_the_only_linear_of_a_sublayer_makes_up_for_the_whole_stream(make_model, text, tmp_path, monkeypatch):
    """It is in the first stage and in the last one. The dense stream is still before the sublayer then."""
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, stream: mlp.down_proj(stream))
    source = make_model(tmp_path / "in", "llama", intermediate_size=128)
    found, tokens = statistics_of(source, text, tmp_path / "out", monkeypatch)
    assert Reader(tmp_path / "out").schema.recipe["topology"][0]["sublayers"][1]["factor"] == 1
    dense = AutoModelForCausalLM.from_pretrained(source).double().eval().requires_grad_(False)
    model = pruned_in_full(source, tmp_path / "out", tmp_path / "full")
    (expected, streams), (_, goal) = (seen_by(one, tokens, found) for one in (model, dense))
    for index in (0, 1):
        name = f"model.layers.{index}.mlp.down_proj"
        linear, X = dense.get_submodule(name), expected[name]
        missing = goal[index, "after"] - streams[index, "between"] - linear(X)
        assert_drift(found[name].drift, linear.weight, X, missing, linear(X).norm(), name)
        assert missing.norm() > 0.01 * linear(X).norm()


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma3n"])
def test_layers_that_read_keys_and_values_get_those_of_the_pruned_layers(family, tiny, text, tmp_path, monkeypatch):
    """Their inputs are those of the whole model with what is pruned so far, and their drift is from the dense model."""
    found, tokens = statistics_of(tiny(family), text, tmp_path / "out", monkeypatch)
    dense = AutoModelForCausalLM.from_pretrained(tiny(family)).double().eval()
    model = pruned_in_full(tiny(family), tmp_path / "out", tmp_path / "full")
    expected, undrifted = (dict(seen_by(one, tokens, found)[0]) for one in (model, dense))
    mixed, layers = seen_by(with_shared_from(dense, model), tokens, found)[0], range(4)
    for name, X in expected.items():
        if family == "gemma4-e2b" and name.endswith("o_proj"):  # only a norm lies between its output and the stream
            X = X * rms_factors(dense.get_submodule(name), X)
        gram = X.T @ X
        scale = gram.diagonal().sqrt()
        assert ((found[name].gram.dense() - gram).abs() <= 1e-4 * scale[:, None] * scale + 1e-6).all(), name
        torch.testing.assert_close(found[name].norm.double(), scale, rtol=1e-4, atol=1e-5)
    assert len(expected) == len(found) == 4 * (6 if family == "gemma4-e2b" else 7)
    for index in layers:
        name = next(name for name in found if f"layers.{index}." in name and name.endswith(("q_proj", "linear_left")))
        linear, X = dense.get_submodule(name).requires_grad_(False), expected[name]
        missing = (undrifted[name] - X) @ linear.weight.T
        assert_drift(found[name].drift, linear.weight, X, missing, linear(X).norm(), name)
    for index in (2, 3):  # what they would read with the dense model's keys and values is something else
        name = f"model.layers.{index}.self_attn.o_proj"
        assert (mixed[name] - expected[name]).norm() > 0.01 * expected[name].norm()


def with_shared_from(dense, model):
    """The pruned model, whose last layers read the dense one's keys and values."""
    kept = {}

    def keep(_, args, kwargs):
        kept.update(kwargs["shared_kv_states"])

    def give(_, args, kwargs):
        return args, kwargs | {"shared_kv_states": dict(kept)}

    def run_dense(_, args, kwargs):
        hook = dense.model.layers[2].register_forward_pre_hook(keep, with_kwargs=True)
        dense(input_ids=kwargs["input_ids"], use_cache=False)
        hook.remove()

    model.register_forward_pre_hook(run_dense, with_kwargs=True)
    for layer in model.model.layers[2:]:
        layer.register_forward_pre_hook(give, with_kwargs=True)
    return model


def test_layers_of_one_stage_aim_at_the_dense_models_outputs(tiny, text, tmp_path, monkeypatch):
    """A linear with fewer outputs than inputs has no [in, in] matrix of drift."""
    describe = survey.describe

    def of_one_stage(*arguments):
        found = describe(*arguments)
        groups = [Group(group.linears) for part in found.sublayers for stage in part.stages for group in stage]
        return Topology((Sublayer("layer", (tuple(groups),)),))

    monkeypatch.setattr(survey, "describe", of_one_stage)
    source = tiny("gpt-neox")
    found, tokens = statistics_of(source, text, tmp_path / "out", monkeypatch)
    dense = AutoModelForCausalLM.from_pretrained(source).double().eval()
    pruned = pruned_in_full(source, tmp_path / "out", tmp_path / "full")

    def read_in_layer(index, one):
        """The inputs of layer `index`; everything before it as `one` computes it, the layer itself dense."""
        own = one.gpt_neox.layers[index]
        one.gpt_neox.layers[index] = dense.gpt_neox.layers[index]
        inputs = {}
        hooks = [
            dense.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
            )
            for name in found
            if f"layers.{index}." in name
        ]
        with torch.no_grad():
            one(input_ids=tokens)
        for hook in hooks:
            hook.remove()
        one.gpt_neox.layers[index] = own
        return inputs

    assert len(found) == 8
    for index in range(2):
        dense_reads, pruned_reads = (read_in_layer(index, one) for one in (dense, pruned))
        for name, X in pruned_reads.items():
            linear, drift = dense.get_submodule(name).requires_grad_(False), found[name].drift
            missing = (dense_reads[name] - X) @ linear.weight.T
            narrows = linear.out_features < linear.in_features
            assert isinstance(drift, OutputDrift if narrows else InputDrift), name
            assert_drift(drift, linear.weight, X, missing, (X @ linear.weight.T).norm(), name)
    assert sum(isinstance(one.drift, OutputDrift) for one in found.values()) == 2

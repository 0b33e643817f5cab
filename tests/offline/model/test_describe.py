"""What experiments find out about the layers of many families."""

import pytest
import torch
from decoders import calls_of, described, layers_of, lines, small
from expected_layers import OPT, OTHERS, TABLE
from transformers.models.llama.modeling_llama import LlamaMLP

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.sublayer import SublayerRunner
from ria_vllm.offline.model.experiments.describe import describe


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


@pytest.mark.parametrize("model_type", TABLE)
def test_the_listed_families_are_what_the_table_said(model_type):
    assert list(lines(described(small(model_type)))) == table(TABLE[model_type])


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families(model_type):
    assert list(lines(described(small(model_type)))) == table(OTHERS[model_type])


def test_a_norm_after_the_sum_can_be_cut_before():
    """OPT-350m: the norm after attention is a part of what comes after it."""
    found = list(lines(described(small("opt", do_layer_norm_before=False))))
    assert found == table(OPT.replace("final_layer_norm", "self_attn_layer_norm").replace("/2 +", "/2"))


def check_sublayers(model, topologies):
    """The sublayers, one after the other, are the layer."""
    calls = calls_of(model, torch.arange(40, 70).view(2, 15))
    for index, (layer, (call, stream)) in enumerate(zip(layers_of(model), calls, strict=True)):
        result = stream
        for sublayer in topologies.of(index).sublayers:
            before = result
            runner = SublayerRunner(layer, sublayer, torch.float32)
            last = sublayer.norm or sublayer.stages[-1][0].linears[0] if sublayer.factor else None
            added = []
            hook = last and layer.get_submodule(last).register_forward_hook(lambda _, __, out, a=added: a.append(out))
            result = runner.run(before, call)
            if hook:
                hook.remove()
                if not added:  # the pass stops before the linear of the next part
                    raise AssertionError(f"{last} did not run")
                torch.testing.assert_close(
                    before + sublayer.factor * added[-1].view_as(before), result, rtol=1e-4, atol=1e-4
                )
        torch.testing.assert_close(result, call(layer, stream), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [
        ("llama", ("input_layernorm", "post_attention_layernorm")),
        ("gemma3_text", ("input_layernorm", "pre_feedforward_layernorm")),
        ("olmo2", ()),  # what reads the stream are linears
        ("opt", ()),  # LayerNorms
    ],
)
def test_norms_that_read_the_stream(model_type, norms):
    assert described(small(model_type)).of(0).norms == norms


def test_a_number_that_each_layer_has_for_itself_is_no_factor(monkeypatch):
    def init(self, *arguments, **options):
        real(self, *arguments, **options)
        self.gate = torch.nn.Parameter(torch.tensor(1.0))

    real, forward = LlamaMLP.__init__, LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "__init__", init)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.gate * forward(self, x))
    attention, mlp = described(small("llama")).of(0).sublayers
    assert (attention.factor, mlp.factor) == (1, 0)


@pytest.mark.parametrize("model_type", [*TABLE, *OTHERS])
def test_the_sublayers_in_turn_are_the_layer(model_type):
    """With the model's own weights, in float32, on other tokens than those of the experiment."""
    model = small(model_type)
    check_sublayers(model, described(model))


def test_stages_follow_what_depends_on_what():
    """Of linears that read the same tensor, or do not depend on each other, none has to wait."""
    (topology,) = described(small("gpt_neox")).kinds
    stages = [[group.linears for group in stage] for stage in topology.sublayers[0].stages]
    assert stages == [
        [("attention.query_key_value",), ("mlp.dense_h_to_4h",)],
        [("attention.dense",), ("mlp.dense_4h_to_h",)],
    ]


def test_a_linear_that_is_called_twice_is_in_one_group(monkeypatch):
    """In two groups its statistics would never be complete."""
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x) + real(self, 2 * x))
    (topology,) = described(small("llama")).kinds
    assert sorted(topology.linears) == sorted(set(topology.linears)) and len(topology.linears) == 7


def test_a_norm_that_is_called_twice_marks_no_cut():
    """A part ends at the first call of a module, which is in the first part."""
    model = small("llama")
    for layer in layers_of(model):
        layer.post_attention_layernorm = layer.input_layernorm
    topologies = described(model)
    assert [part.ends_before for part in topologies.of(0).sublayers] in ([None], ["mlp", None])
    check_sublayers(model, topologies)


def test_a_linear_that_is_not_called_stays_dense(monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.up_proj(x)[..., : x.shape[-1]])
    (topology,) = described(small("llama")).kinds
    unused = ("mlp.gate_proj", "mlp.down_proj")
    assert topology.dense == dict.fromkeys(unused, "takes no part in a forward pass")


def test_an_output_as_wide_as_the_stream_is_not_always_the_stream():
    """Permutations stay within ranks in what is row-parallel: not in an up projection that happens to be square."""
    (topology,) = described(small("nemotron", intermediate_size=64)).kinds
    assert not any(group.within_ranks for part in topology.sublayers for stage in part.stages for group in stage)


def test_what_reads_the_same_tensor_in_one_module_stays_together():
    first, _ = described(small("qwen3_5_text")).kinds
    names = [f"linear_attn.in_proj_{x}" for x in ("qkv", "z", "b", "a")]
    assert set(first.fused_with(names[0], first.linears)) == set(names)
    # In a layer with parallel attention and MLP, linears are fused within a module, never across two.
    (parallel,) = described(small("cohere2")).kinds
    assert parallel.fused_with("mlp.up_proj", parallel.linears) == ["mlp.gate_proj", "mlp.up_proj"]


def test_an_experiment_that_fails(monkeypatch):
    """A layer that is random in itself."""
    model = small("llama")
    layer, batch = layers_of(model)[0], calls_of(model, torch.arange(8)[None])[0]
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x + torch.rand_like(x)))
    with pytest.raises(RiaError, match="does not compute the same values twice"):
        describe(model.config, layer, batch, batch)

"""What experiments find out about the layers of many families."""

import pytest
import torch
from decoders import calls_of, described, layers_of, lines, small
from transformers.models.llama.modeling_llama import LlamaMLP

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.sublayer import SublayerRunner
from ria_vllm.offline.model.describe import describe, describe_as_it_is

LLAMA = """
attention until post_attention_layernorm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.o_proj heads 4/2x16
mlp without self_attn/2 +
  mlp.gate_proj mlp.up_proj
  mlp.down_proj
  self_attn.o_proj <- self_attn.v_proj 4/2
  mlp.down_proj <- mlp.gate_proj, mlp.up_proj
"""
GEMMA_2 = LLAMA.replace("post_attention_layernorm +", "pre_feedforward_layernorm").replace("/2 +", "/2")
PHI_3 = """
attention until post_attention_layernorm +
  self_attn.qkv_proj
  self_attn.o_proj heads 4/2x16
mlp without self_attn/2 +
  mlp.gate_up_proj
  mlp.down_proj
  self_attn.o_proj <- self_attn.qkv_proj[96:128] 4/2
  mlp.down_proj <- mlp.gate_up_proj[0:96], mlp.gate_up_proj[96:192]
"""
OPT = """
attention until final_layer_norm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.out_proj heads 4/4x16
mlp without self_attn/2 +
  fc1
  fc2
  self_attn.out_proj <- self_attn.v_proj 4/4
  fc2 <- fc1
"""
# What a table said before there were experiments.
TABLE = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), LLAMA)
TABLE |= {"gemma2": GEMMA_2, "gemma3_text": GEMMA_2, "phi3": PHI_3, "opt": OPT}

AFTER_NORM = LLAMA.replace("post_attention_layernorm +", "mlp").replace("/2 +", "/2")  # norms before the stream only
GLM = """
attention until post_attention_layernorm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.o_proj heads 4/2x16
mlp without self_attn/2 +
  mlp.gate_up_proj
  mlp.down_proj
  self_attn.o_proj <- self_attn.v_proj 4/2
  mlp.down_proj <- mlp.gate_up_proj[0:96], mlp.gate_up_proj[96:192]
"""
NO_GATE = LLAMA.replace("mlp.gate_proj mlp.up_proj", "mlp.up_proj").replace("mlp.gate_proj, mlp.up_proj", "mlp.up_proj")
PARALLEL = """
layer
  self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj
  self_attn.o_proj heads 4/2x16 | mlp.down_proj
  self_attn.o_proj <- self_attn.v_proj 4/2
  mlp.down_proj <- mlp.gate_proj, mlp.up_proj
"""
DENSE_LAYER = """
attention until post_attention_layernorm +
  self_attn.q_a_proj self_attn.kv_a_proj_with_mqa
  self_attn.q_b_proj
  self_attn.o_proj blocks 8
mlp without self_attn/2 +
  mlp.gate_proj mlp.up_proj
  mlp.down_proj
  mlp.down_proj <- mlp.gate_proj, mlp.up_proj
"""
SHARED_EXPERT = """
  mlp.shared_expert.gate_proj mlp.shared_expert.up_proj experts mlp.experts
  mlp.shared_expert.down_proj
"""
EXPERTS_FOLD = "  mlp.experts.{e}.down_proj <- mlp.experts.{e}.gate_proj, mlp.experts.{e}.up_proj\n"
SHARED_FOLDS = (
    "  mlp.shared_expert.down_proj <- mlp.shared_expert.gate_proj, mlp.shared_expert.up_proj\n" + EXPERTS_FOLD
)
GATED_DELTA = """
attention until post_attention_layernorm +
  linear_attn.in_proj_qkv linear_attn.in_proj_z linear_attn.in_proj_b linear_attn.in_proj_a
  linear_attn.out_proj blocks 8
mlp without linear_attn/0 +
  mlp.gate_proj mlp.up_proj
  mlp.down_proj
  mlp.down_proj <- mlp.gate_proj, mlp.up_proj
"""
# The gate on attention's output is in the rows of q_proj, head by head, behind each head's queries.
GATED = LLAMA.replace("self_attn.v_proj 4/2", "self_attn.v_proj, self_attn.q_proj[16:32]x4 4/2")

OTHERS = dict.fromkeys(
    ("granite", "smollm3", "stablelm", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "helium", "ministral3"), LLAMA
)
OTHERS |= dict.fromkeys(("olmo2", "olmo3", "exaone4"), AFTER_NORM)
OTHERS |= dict.fromkeys(("nemotron", "arcee"), NO_GATE)
OTHERS |= {
    "apertus": NO_GATE.replace("until post_attention_layernorm", "until feedforward_layernorm"),
    "cohere2": PARALLEL,
    "glm": GLM,
    "glm4": GLM.replace(" +", ""),
    "starcoder2": NO_GATE.replace("up_proj", "c_fc").replace("down_proj", "c_proj"),
    "gemma4_text": GEMMA_2 + GEMMA_2.replace("x16", "x32"),
    "phi": """
layer
  self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1
  self_attn.dense heads 4/2x16 | mlp.fc2
  self_attn.dense <- self_attn.v_proj 4/2
  mlp.fc2 <- mlp.fc1
""",
    "gpt_neox": """
layer
  attention.query_key_value | mlp.dense_h_to_4h
  attention.dense heads 4/4x16 | mlp.dense_4h_to_h
  attention.dense <- attention.query_key_value[32:48]x4 4/4
  mlp.dense_4h_to_h <- mlp.dense_h_to_4h
""",
    "bloom": """
layer
  self_attention.query_key_value
  self_attention.dense heads 8/8x8
  mlp.dense_h_to_4h
  mlp.dense_4h_to_h
  self_attention.dense <- self_attention.query_key_value[16:24]x8 8/8
  mlp.dense_4h_to_h <- mlp.dense_h_to_4h
""",
    # Norms come before o_proj and down_proj, and their weights differ between channels.
    "bitnet": """
attention until post_attention_layernorm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.o_proj blocks 8
mlp without self_attn/2 +
  mlp.gate_proj mlp.up_proj
  mlp.down_proj blocks 8
""",
    "qwen3_5_text": GATED_DELTA + GATED,
    "lfm2": """
attention until ffn_norm +
  conv.in_proj
  conv.out_proj blocks 8
mlp without conv/0 +
  feed_forward.w1 feed_forward.w3
  feed_forward.w2
  feed_forward.w2 <- feed_forward.w1, feed_forward.w3
attention until ffn_norm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.out_proj heads 4/2x16
mlp without self_attn/2 +
  feed_forward.w1 feed_forward.w3
  feed_forward.w2
  self_attn.out_proj <- self_attn.v_proj 4/2
  feed_forward.w2 <- feed_forward.w1, feed_forward.w3
""",
    "bamba": """
attention until pre_ff_layernorm +
  mamba.in_proj
  mamba.out_proj blocks 8
mlp without mamba/0 +
  feed_forward.gate_proj feed_forward.up_proj
  feed_forward.down_proj
  feed_forward.down_proj <- feed_forward.gate_proj, feed_forward.up_proj
"""
    + LLAMA.replace("mlp.", "feed_forward.").replace("post_attention_layernorm", "pre_ff_layernorm"),
    "falcon_h1": """
layer
  mamba.in_proj | self_attn.q_proj self_attn.k_proj self_attn.v_proj
  mamba.out_proj blocks 8 | self_attn.o_proj heads 4/2x16
  feed_forward.up_proj feed_forward.gate_proj
  feed_forward.down_proj
  self_attn.o_proj <- self_attn.v_proj 4/2
  feed_forward.down_proj <- feed_forward.up_proj, feed_forward.gate_proj
""",
    "mixtral": """
attention until post_attention_layernorm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.o_proj heads 4/2x16
mlp without self_attn/2
  experts mlp.experts
  self_attn.o_proj <- self_attn.v_proj 4/2
"""
    + EXPERTS_FOLD,
    "qwen3_next": """
attention until post_attention_layernorm +
  linear_attn.in_proj_qkvz linear_attn.in_proj_ba
  linear_attn.out_proj blocks 8
mlp without linear_attn/0"""
    + SHARED_EXPERT
    + SHARED_FOLDS
    + """
attention until post_attention_layernorm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.o_proj heads 4/2x16
mlp without self_attn/2"""
    + SHARED_EXPERT
    + "  self_attn.o_proj <- self_attn.v_proj, self_attn.q_proj[16:32]x4 4/2\n"
    + SHARED_FOLDS,
    "deepseek_v3": DENSE_LAYER
    + DENSE_LAYER.partition("mlp without")[0]
    + ("mlp without self_attn/2" + SHARED_EXPERT + SHARED_FOLDS).replace("shared_expert", "shared_experts"),
    "granitemoehybrid": "".join(
        f"""
attention until post_attention_layernorm +
{attention}
mlp without {zeroed}
  shared_mlp.input_linear experts block_sparse_moe.experts
  shared_mlp.output_linear
{fold}  shared_mlp.output_linear <- shared_mlp.input_linear[0:64], shared_mlp.input_linear[64:128]
{EXPERTS_FOLD.replace("mlp.experts", "block_sparse_moe.experts")}"""
        for attention, zeroed, fold in (
            ("  mamba.in_proj\n  mamba.out_proj blocks 8", "mamba/0", ""),
            (*LLAMA.partition("+\n")[2].partition("\nmlp")[:1], "self_attn/2", LLAMA.splitlines()[-2] + "\n"),
        )
    ),
}
OTHERS["gpt_oss"] = OTHERS["mixtral"]


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
            runner = SublayerRunner(layer, sublayer, {stream.shape: call}, torch.float32)
            last = sublayer.stages[-1][0].linears[0] if sublayer.additive else None
            added = []
            hook = last and layer.get_submodule(last).register_forward_hook(lambda _, __, out, a=added: a.append(out))
            result = runner.run(before)
            if hook:
                hook.remove()
                if not added:  # the pass stops before the linear of the next part
                    raise AssertionError(f"{last} did not run")
                torch.testing.assert_close(before + added[-1].view_as(before), result, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result, call(layer, stream), rtol=1e-4, atol=1e-4)


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
    """Blocks are for what is row-parallel: not for an up projection that happens to be square."""
    (topology,) = described(small("nemotron", intermediate_size=64)).kinds
    assert all(group.blocks == 1 for part in topology.sublayers for stage in part.stages for group in stage)


def test_what_reads_the_same_tensor_in_one_module_stays_together():
    first, _ = described(small("qwen3_5_text")).kinds
    names = [f"linear_attn.in_proj_{x}" for x in ("qkv", "z", "b", "a")]
    assert set(first.fused_with(names[0], first.linears)) == set(names)
    # In a layer with parallel attention and MLP, linears are fused within a module, never across two.
    (parallel,) = described(small("cohere2")).kinds
    assert parallel.fused_with("mlp.up_proj", parallel.linears) == ["mlp.gate_proj", "mlp.up_proj"]


def test_an_experiment_that_fails(monkeypatch):
    """A layer that is random in itself has no topology by experiment, but its linears can still be grouped."""
    model = small("llama")
    layer, batch = layers_of(model)[0], calls_of(model, torch.arange(8)[None])[0]
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x + torch.rand_like(x)))
    with pytest.raises(RiaError, match="does not compute the same values twice"):
        describe(model.config, layer, batch, batch)
    topology = describe_as_it_is(layer, *batch)
    assert [group.linears for group in topology.sublayers[0].stages[0]] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    ]  # fmt: skip
    assert len(topology.sublayers) == 1 and topology.folds == ()
    assert [group.blocks for group in topology.sublayers[0].stages[0]] == [1, 8, 1, 8]

"""What experiments should find out about the layers of each family, in the words of `decoders.lines`."""

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
GEMMA_2 = LLAMA.replace("post_attention_layernorm +", "pre_feedforward_layernorm + post_attention_layernorm").replace(
    "/2 +", "/2 + post_feedforward_layernorm"
)
# Each layer multiplies its output by a number of its own.
GEMMA_4 = GEMMA_2.replace(" + post_feedforward_layernorm", "")
# One linear for gate and up.
GLM = LLAMA.replace("mlp.gate_proj mlp.up_proj", "mlp.gate_up_proj").replace(
    "mlp.gate_proj, mlp.up_proj", "mlp.gate_up_proj[0:96], mlp.gate_up_proj[96:192]"
)
PHI_3 = GLM.replace("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.qkv_proj").replace(
    "<- self_attn.v_proj", "<- self_attn.qkv_proj[96:128]"
)
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

# Norms before the stream only.
AFTER_NORM = LLAMA.replace("post_attention_layernorm +", "mlp + post_attention_layernorm").replace(
    "/2 +", "/2 + post_feedforward_layernorm"
)
NO_GATE = LLAMA.replace("mlp.gate_proj mlp.up_proj", "mlp.up_proj").replace("mlp.gate_proj, mlp.up_proj", "mlp.up_proj")
PARALLEL = """
layer
  self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj
  self_attn.o_proj heads 4/2x16 | mlp.down_proj
  self_attn.o_proj <- self_attn.v_proj 4/2
  mlp.down_proj <- mlp.gate_proj, mlp.up_proj
"""
# The rows of kv_b_proj are each head's 24 keys and 16 values.
LATENT = """
attention until post_attention_layernorm +
  self_attn.q_a_proj self_attn.kv_a_proj_with_mqa
  self_attn.q_b_proj | self_attn.kv_b_proj
  self_attn.o_proj heads 4/4x16
mlp without self_attn/2 +
  mlp.gate_proj mlp.up_proj
  mlp.down_proj
  self_attn.o_proj <- self_attn.kv_b_proj[24:40]x4 4/4
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
MIXER = """
attention until post_attention_layernorm +
  mixer.in_proj
  mixer.out_proj within ranks
mlp without mixer/0 +
  mlp.gate_proj mlp.up_proj
  mlp.down_proj
  mlp.down_proj <- mlp.gate_proj, mlp.up_proj
"""
GATED_DELTA = MIXER.replace(
    "mixer.in_proj", "mixer.in_proj_qkv mixer.in_proj_z mixer.in_proj_b mixer.in_proj_a"
).replace("mixer", "linear_attn")
# The gate on attention's output is in the rows of q_proj, head by head, behind each head's queries.
GATED = LLAMA.replace("self_attn.v_proj 4/2", "self_attn.v_proj, self_attn.q_proj[16:32]x4 4/2")


def renamed(layers, **names):
    for name, other in names.items():
        layers = layers.replace(name, other)
    return layers


OTHERS = dict.fromkeys(
    ("granite", "smollm3", "stablelm", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "helium", "ministral3"), LLAMA
)
OTHERS |= dict.fromkeys(("olmo2", "olmo3", "exaone4"), AFTER_NORM)
OTHERS |= dict.fromkeys(("nemotron", "arcee"), NO_GATE)
OTHERS |= {
    "apertus": NO_GATE.replace("until post_attention_layernorm", "until feedforward_layernorm"),
    "cohere2": PARALLEL,
    "glm": GLM,
    "glm4": GLM.replace("layernorm +", "layernorm + post_self_attn_layernorm").replace(
        "/2 +", "/2 + post_mlp_layernorm"
    ),
    "starcoder2": NO_GATE.replace("up_proj", "c_fc").replace("down_proj", "c_proj"),
    "gemma4_text": GEMMA_4 + GEMMA_4.replace("x16", "x32"),
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
attention until post_attention_layernorm +
  self_attention.query_key_value
  self_attention.dense heads 8/8x8
mlp without self_attention/2 but the stream +
  mlp.dense_h_to_4h
  mlp.dense_4h_to_h
  self_attention.dense <- self_attention.query_key_value[16:24]x8 8/8
  mlp.dense_4h_to_h <- mlp.dense_h_to_4h
""",
    "falcon": """
layer
  self_attention.query_key_value | mlp.dense_h_to_4h
  self_attention.dense heads 4/2x16 | mlp.dense_4h_to_h
  self_attention.dense <- self_attention.query_key_value[48:64]x2 4/2
  mlp.dense_4h_to_h <- mlp.dense_h_to_4h
""",
    "gpt_bigcode": """
attention until ln_2 +
  attn.c_attn
  attn.c_proj heads 4/1x16
mlp without attn/2 +
  mlp.c_fc
  mlp.c_proj
  attn.c_proj <- attn.c_attn[80:96] 4/1
  mlp.c_proj <- mlp.c_fc
""",
    "nemotron_h": """
layer
  mixer.shared_experts.up_proj experts mixer.experts
  mixer.shared_experts.down_proj
  mixer.shared_experts.down_proj <- mixer.shared_experts.up_proj
  mixer.experts.{e}.down_proj <- mixer.experts.{e}.up_proj
layer +
  mixer.q_proj mixer.k_proj mixer.v_proj
  mixer.o_proj heads 4/2x16
  mixer.o_proj <- mixer.v_proj 4/2
""",
    # Norms come before o_proj and down_proj, and their weights differ between channels.
    "bitnet": """
attention until post_attention_layernorm +
  self_attn.q_proj self_attn.k_proj self_attn.v_proj
  self_attn.o_proj within ranks
mlp without self_attn/2 +
  mlp.gate_proj mlp.up_proj
  mlp.down_proj within ranks
""",
    "qwen3_5_text": GATED_DELTA + GATED,
    "lfm2": renamed(
        MIXER + LLAMA,
        mixer="conv",
        post_attention_layernorm="ffn_norm",
        o_proj="out_proj",
        gate_proj="w1",
        up_proj="w3",
        down_proj="w2",
    ).replace("mlp.", "feed_forward."),
    "bamba": renamed(MIXER + LLAMA, mixer="mamba", post_attention_layernorm="pre_ff_layernorm").replace(
        "mlp.", "feed_forward."
    ),
    "falcon_h1": """
attention until pre_ff_layernorm
  mamba.in_proj | self_attn.q_proj self_attn.k_proj self_attn.v_proj
  mamba.out_proj within ranks | self_attn.o_proj heads 4/2x16
mlp without mamba/0 without self_attn/2 +
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
  linear_attn.out_proj within ranks
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
    "deepseek_v3": LATENT
    + LATENT.partition("mlp without")[0]
    + ("mlp without self_attn/2" + SHARED_EXPERT).replace("shared_expert", "shared_experts")
    + LATENT.splitlines()[-2]
    + "\n"
    + SHARED_FOLDS.replace("shared_expert", "shared_experts"),
    "minicpm3": LATENT.replace(" +", " + 0.989949493661 *"),
    "granitemoehybrid": "".join(
        f"""
attention until post_attention_layernorm +
{attention}
mlp without {absent}
  shared_mlp.input_linear experts block_sparse_moe.experts
  shared_mlp.output_linear
{fold}  shared_mlp.output_linear <- shared_mlp.input_linear[0:64], shared_mlp.input_linear[64:128]
{EXPERTS_FOLD.replace("mlp.experts", "block_sparse_moe.experts")}"""
        for attention, absent, fold in (
            ("  mamba.in_proj\n  mamba.out_proj within ranks", "mamba/0", ""),
            (*LLAMA.partition("+\n")[2].partition("\nmlp")[:1], "self_attn/2", LLAMA.splitlines()[-2] + "\n"),
        )
    ),
}
OTHERS["gpt_oss"] = OTHERS["mixtral"]

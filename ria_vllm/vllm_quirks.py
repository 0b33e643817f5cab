"""What vLLM does with some linears, whatever the model's own layers look like.

No other module, offline or in serving, lists families or linears for vLLM's sake.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

# Linears that vLLM fuses into one: all of a set are pruned, or none. The same goes for all linears of a module that
# read the same tensor: w1 and w3, in_proj_qkv and in_proj_z, q_a_proj and kv_a_proj_with_mqa.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# vLLM's mixer passes no quantization method to its linears. (Its Mamba-2 mixer does.)
MAMBA_1 = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")

# Linears that choose experts. vLLM passes them no quantization method.
ROUTERS = ("router", "gate", "shared_expert_gate")

# Other linears to which vLLM passes no quantization method, or whose weights it reads directly: in DeepSeek's sparse
# attention and compressors, in Qwen's hyper-connections, in Gemma 3n's alternating updates (the last two are tiny,
# too).
DENSE_ONLY = {
    "weights_proj", "compressor", "o_a_proj",
    "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight",
    "modality_router", "prediction_coefs", "correction_coefs",
}  # fmt: skip

# vLLM's models of these families change the order of attention's rows as they load them, see
# `ria_vllm.serve.model.rearranged`. GPT-NeoX's does so before vLLM 0.32; later versions run the model of transformers.
REARRANGED = ("bloom", "falcon", "gpt_neox", "llama4", "llama4_text")

READS_EMBEDDING = ("gemma3n", "gemma3n_text", "diffusion_gemma", "cohere", "cohere2")


def rearranged(hf_config: Any) -> bool:
    """Whether vLLM's model of this config, or of the text decoder in it, changes the order of rows; of None, False."""
    return _is_one_of(hf_config, REARRANGED)


def reads_embedding(hf_config: Any) -> bool:
    """Whether vLLM's model of this config reads the weight of its embedding or head itself, not through the layer."""
    return _is_one_of(hf_config, READS_EMBEDDING)


def _is_one_of(hf_config: Any, types: tuple[str, ...]) -> bool:
    configs = (hf_config, getattr(hf_config, "text_config", None))
    return any(getattr(config, "model_type", None) in types for config in configs)


def changes_head(hf_config: Any) -> bool:
    """Whether vLLM's model of this config scales the rows of its head as it loads them: BailingMoe's does."""
    text_config = getattr(hf_config, "get_text_config", lambda: hf_config)()
    return bool(getattr(text_config, "norm_head", False))


def fused_sets(linears: Iterable[str]) -> list[set[str]]:
    """The sets of linears in the modules of these `linears` that vLLM is known to fuse (see `FUSED`)."""
    parents = {linear.rpartition(".")[0] for linear in linears}
    return [{f"{parent}.{leaf}" if parent else leaf for leaf in fused} for parent in parents for fused in FUSED]


def served_dense(layer: nn.Module) -> dict[str, str]:
    """The linears of a layer that vLLM can only serve dense, by their names relative to it -> why."""
    linears = [name for name, child in layer.named_modules() if isinstance(child, nn.Linear)]
    experts = [name for name, _ in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    dense: dict[str, str] = {}
    for mixer, module in layer.named_modules():
        if type(module).__name__ in MAMBA_1:
            names = [name for name in linears if name.startswith(f"{mixer}.")]
            dense |= dict.fromkeys(names, "vLLM serves the linears of a Mamba-1 mixer dense only")
    for name in linears:
        parts = name.split(".")
        if DENSE_ONLY & set(parts) or name.endswith("indexer.wk"):
            dense[name] = "vLLM serves it dense only"
        elif "router" in parts:
            dense[name] = "chooses experts"
        elif any(name.startswith(f"{module}.") for module in experts):
            dense[name] = "a linear of one expert, which transformers runs as a module of its own"
        elif experts and set(parts) & set(ROUTERS):
            dense[name] = "chooses experts"
    return dense

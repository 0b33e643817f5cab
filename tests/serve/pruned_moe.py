"""Small random MoE models of each family, their experts pruned by magnitude under random permutations.

They do not depend on the offline stage. The oracle is the dense folder with the same weights, in the model's own order.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.format import permutation
from ria_vllm.format.formats import FORMATS
from ria_vllm.format.layer_schema import Experts, Fold, Producer, Stacked
from ria_vllm.format.schema import INT8_TOKENS, RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.format.sparse24 import compress, mask_from_bitmask
from ria_vllm.format.weight_format import SHAPE, name_of

HIDDEN, INNER, EXPERTS = 64, 64, 4


@dataclass(frozen=True)
class MoEFamily:
    """A model type, where its files have the experts, and values of its config.

    Attributes:
        at: name of the experts in the checkpoint.
        linears: the ends of the names of gate, up and down.
        stacked: how the dense model's files stack them.
    """

    model_type: str
    at: str = "model.layers.{i}.mlp.experts"
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[Stacked, ...] = ()
    settings: tuple[tuple[str, object], ...] = ()

    def experts(self) -> Experts:
        gate, up, down = (f"{self.at}.{{e}}.{end}" for end in self.linears)
        return Experts(
            module=self.at, num_experts=EXPERTS, gate=gate, up=up, down=down, stacked=list(self.stacked)
        )  # fmt: skip


QWEN = (("num_experts", EXPERTS), ("num_experts_per_tok", 2), ("moe_intermediate_size", INNER))
SHARED = ("shared_expert_intermediate_size", 96)
GEMMA_4 = "model.layers.{i}.experts"  # beside the dense MLP
GPT_OSS = "model.layers.{i}.mlp.experts"
LLAMA4 = "model.layers.{i}.feed_forward.experts"
FAMILIES = {
    "mixtral": MoEFamily(
        "mixtral", "model.layers.{i}.block_sparse_moe.experts", ("w1", "w3", "w2"),
        settings=(("num_local_experts", EXPERTS), ("num_experts_per_tok", 2)),
    ),
    "qwen2_moe": MoEFamily("qwen2_moe", settings=(*QWEN, SHARED, ("norm_topk_prob", True))),
    "qwen3_moe": MoEFamily("qwen3_moe", settings=(*QWEN, ("norm_topk_prob", True))),
    "granitemoe": MoEFamily(
        "granitemoe", "model.layers.{i}.block_sparse_moe.experts",
        stacked=(
            Stacked(tensor="model.layers.{i}.block_sparse_moe.input_linear.weight", linears=["gate", "up"]),
            Stacked(tensor="model.layers.{i}.block_sparse_moe.output_linear.weight", linears=["down"]),
        ),
        settings=(("num_local_experts", EXPERTS), ("num_experts_per_tok", 2), ("head_dim", None)),
    ),
    "gemma4_text": MoEFamily(
        "gemma4_text", GEMMA_4,
        stacked=(
            Stacked(tensor=f"{GEMMA_4}.gate_up_proj", linears=["gate", "up"]),
            Stacked(tensor=f"{GEMMA_4}.down_proj", linears=["down"]),
        ),
        settings=(
            ("num_experts", EXPERTS), ("top_k_experts", 2), ("moe_intermediate_size", INNER),
            ("enable_moe_block", True), ("layer_types", ["sliding_attention", "full_attention"]),
            ("attention_k_eq_v", True), ("num_global_key_value_heads", 1), ("global_head_dim", 32),
            ("hidden_size_per_layer_input", 0), ("num_kv_shared_layers", 0),
        ),
    ),
    "gpt_oss": MoEFamily(
        "gpt_oss",
        stacked=(
            Stacked(
                tensor=f"{GPT_OSS}.gate_up_proj", bias=f"{GPT_OSS}.gate_up_proj_bias", linears=["gate", "up"],
                interleaved=True, transposed=True,
            ),
            Stacked(
                tensor=f"{GPT_OSS}.down_proj", bias=f"{GPT_OSS}.down_proj_bias", linears=["down"], transposed=True
            ),
        ),
        settings=(("num_local_experts", EXPERTS), ("num_experts_per_tok", 2), ("quantization_config", None)),
    ),
    "llama4": MoEFamily(
        "llama4_text", LLAMA4,
        stacked=(
            Stacked(tensor=f"{LLAMA4}.gate_up_proj", linears=["gate", "up"], transposed=True),
            Stacked(tensor=f"{LLAMA4}.down_proj", linears=["down"], transposed=True),
        ),
        settings=(
            ("num_local_experts", EXPERTS), ("num_experts_per_tok", 1), ("interleave_moe_layer_step", 1),
            ("intermediate_size_mlp", INNER), ("attention_chunk_size", 256),
        ),
    ),
}  # fmt: skip


def save_dense(family: MoEFamily, folder: Path, layers: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random float32 model in the form in which such models are published; returns its tensors."""
    values = {
        "vocab_size": tiny.VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | dict(family.settings)  # fmt: skip
    config = AutoConfig.for_model(family.model_type, **{key: v for key, v in values.items() if v is not None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=HIDDEN**-0.5 * 1.5)
                if ".gate.weight" in name or "router" in name:
                    parameter.mul_(3)  # no ties between experts that rounding could decide
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def expert_matrices(family: MoEFamily, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear of an expert, by its name in the checkpoint -> its [out, in] among the tensors of the dense files."""
    found = {}
    kinds = dict(zip(("gate", "up", "down"), family.linears))
    for i in range(8):
        at = family.at.replace("{i}", str(i))
        for stack in family.stacked:
            tensor = tensors.get(stack.tensor.replace("{i}", str(i)))
            if tensor is None:
                continue
            tensor = tensor.transpose(1, 2) if stack.transposed else tensor
            count = len(stack.linears)
            pieces = [tensor[:, j::count] for j in range(count)] if stack.interleaved else tensor.chunk(count, 1)
            for kind, piece in zip(stack.linears, pieces):
                found |= {f"{at}.{e}.{kinds[kind]}": piece[e] for e in range(EXPERTS)}
        if not family.stacked:
            names = [f"{at}.{e}.{end}" for e in range(EXPERTS) for end in family.linears]
            found |= {name: tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors}
    return found


def write(
    family: MoEFamily,
    folder: Path,
    weights: str = "float",
    permuted: bool = True,
    folds: bool = True,
    seed: int = 0,
    dense_layer: int | None = None,
    dtype: torch.dtype = torch.float32,
    rounded: bool = False,
) -> tuple[Path, Path]:
    """Write a dense folder and the compressed one with the same weights; returns (compressed, dense).

    Args:
        weights: name of the weight format.
        permuted: gate and up of a layer's experts share a random permutation of their input, each down has its own.
        dense_layer: its experts are not pruned.
        dtype: of the model that the weights are quantized for.
        rounded: config.json says that what experts read is rounded to int8.
    """
    dense, out = folder / "dense", folder / "compressed"
    tensors = save_dense(family, dense, seed=seed)
    left = f".layers.{dense_layer}."
    matrices = {name: matrix for name, matrix in expert_matrices(family, tensors).items() if left not in name}
    assert len(matrices) >= 3 * EXPERTS, sorted(tensors)
    rng = torch.Generator().manual_seed(seed)
    weight_format, units, permutations = FORMATS[weights], {}, {}
    for name, matrix in matrices.items():
        layer = name.split(".experts.")[0]
        key = name if name.endswith(family.linears[2]) else layer
        if key not in permutations:
            permutations[key] = torch.randperm(matrix.shape[1], generator=rng)
        p = permutations[key] if permuted else torch.arange(matrix.shape[1])
        stored = matrix[:, p].float()
        mask = mask_from_bitmask(compress(stored)[1])
        stored, scales = weight_format.quantize(stored * mask, dtype)
        parts = weight_format.encode(stored, mask, scales)
        units |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        units[f"{name}.{SHAPE}"] = torch.tensor([[matrix.shape[0]], [matrix.shape[1]]])
        if permuted:
            units[f"{name}.input_permutation"] = p.int()
        matrix.copy_(stored[:, permutation.invert(p)])  # into the dense files' tensor
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    replaced = {f"{name}.weight" for name in matrices}
    replaced |= {stack.tensor.replace("{i}", str(i)) for stack in family.stacked for i in range(8) if i != dense_layer}
    units |= {name: tensor for name, tensor in tensors.items() if name not in replaced}
    experts = family.experts()
    config = json.loads((dense / "config.json").read_text())
    fold = Fold(
        consumer=experts.down, producers=[Producer(name=experts.gate), Producer(name=experts.up)],
        coupling="elementwise",
    )  # fmt: skip
    modules = {name.removesuffix(".weight") for name in units if name.endswith(".weight")}
    quantization = weight_format.quantization
    schema = RiaSchema(
        sparsity_config=SparsityConfig(ignore=sorted(modules)),
        weights=None if quantization is None else WeightQuantization(**quantization, dtype=name_of(dtype)),
        input_activations=INT8_TOKENS if rounded else None,
        folds=[fold] if folds and permuted else [], experts=[experts],
        recipe={"method": "magnitude", "permute": "lsa" if permuted else "none"},
    )  # fmt: skip
    writer = CheckpointWriter(out, overwrite=True)
    writer.write("all", units)
    writer.finish(["all"], {"config.json": config | {"quantization_config": schema.model_dump()}}, {}, 1 << 40)
    return out, dense

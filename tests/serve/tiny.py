"""Small random models of each family, pruned by magnitude under random permutations that obey the family's folds.

They do not depend on the offline stage. The oracle is Hugging Face's own model with the pruned weights, in the model's
own order.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.format import permutation, sparse24
from ria_vllm.format.formats import FORMATS
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.format.pattern import PATTERNS
from ria_vllm.format.schema import INT8_TOKENS, RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.format.weight_format import name_of

HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 32, 128, 256, 288
Rows = tuple[str, tuple[int, int] | None]  # of each of `value_blocks` blocks, for values


@dataclass(frozen=True)
class Family:
    """A model type with the names that its folds need, and `kv` key-value heads.

    `settings` are values of the config; None leaves a key out. `auto` builds the model.
    """

    model_type: str
    kv: int = HEADS
    block: str = "model.layers.{i}."
    shared: tuple[tuple[str, ...], ...] = (
        ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"),
    )  # fmt: skip
    value: Rows = ("self_attn.v_proj", None)
    value_blocks: int = 1
    output: str = "self_attn.o_proj"
    inner: tuple[Rows, ...] = (("mlp.gate_proj", None), ("mlp.up_proj", None))
    down: str = "mlp.down_proj"
    settings: tuple[tuple[str, object], ...] = ()
    auto: type = AutoModelForCausalLM

    def folds(self) -> list[Fold]:
        def absolute(name: str, rows: tuple[int, int] | None, blocks: int = 1) -> Producer:
            return Producer(name=self.block + name, rows=rows, blocks=blocks)

        return [
            Fold(consumer=self.block + self.output, producers=[absolute(*self.value, self.value_blocks)],
                 coupling="heads", num_heads=HEADS, num_kv_heads=self.kv),
            Fold(consumer=self.block + self.down, producers=[absolute(*p) for p in self.inner], coupling="elementwise"),
        ]  # fmt: skip


PHI3 = Family(
    "phi3", kv=2, shared=(("self_attn.qkv_proj",), ("mlp.gate_up_proj",)),
    value=("self_attn.qkv_proj", (6 * HEAD_DIM, 8 * HEAD_DIM)),
    inner=(("mlp.gate_up_proj", (0, INNER)), ("mlp.gate_up_proj", (INNER, 2 * INNER))),
    settings=(("pad_token_id", 0), ("original_max_position_embeddings", 256)),
)  # fmt: skip
OPT = Family(
    "opt", block="model.decoder.layers.{i}.",
    output="self_attn.out_proj", inner=(("fc1", None),), down="fc2",
    settings=(("ffn_dim", INNER), ("word_embed_proj_dim", HIDDEN), ("dropout", 0.0), ("activation_function", "relu")),
)  # fmt: skip

# vLLM's model rearranges the rows of its values, which have a permutation of their own, too.
FALCON = Family(
    "falcon", kv=2, block="transformer.h.{i}.",
    shared=(("self_attention.query_key_value",), ("mlp.dense_h_to_4h",)),
    value=("self_attention.query_key_value", (3 * HEAD_DIM, 4 * HEAD_DIM)), value_blocks=2,
    output="self_attention.dense", inner=(("mlp.dense_h_to_4h", None),), down="mlp.dense_4h_to_h",
    settings=(
        ("head_dim", None), ("new_decoder_architecture", True), ("num_kv_heads", 2), ("bias", False), ("alibi", False),
        ("ffn_hidden_size", 4 * HIDDEN), ("hidden_dropout", 0.0), ("attention_dropout", 0.0),
    ),
)  # fmt: skip


def latent(model_type: str, keys: int, *settings: tuple[str, Any]) -> Family:
    """With latent attention: in kv_b_proj are each head's keys, so many, and behind them its values."""
    widths = (("q_lora_rank", 64), ("qk_nope_head_dim", keys), ("v_head_dim", HEAD_DIM), ("head_dim", None))
    return Family(
        model_type, value=("self_attn.kv_b_proj", (keys, keys + HEAD_DIM)), value_blocks=HEADS,
        shared=(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), ("mlp.gate_proj", "mlp.up_proj")),
        settings=(*widths, *settings),
    )  # fmt: skip


GEMMA = (("query_pre_attn_scalar", HEAD_DIM), ("sliding_window", 64))
FAMILIES = {
    "llama-mha": Family("llama"),
    "llama-gqa": Family("llama", kv=2),
    "llama-mqa": Family("llama", kv=1),
    "llama-bias": Family("llama", kv=2, settings=(("attention_bias", True), ("mlp_bias", True))),
    "mistral": Family("mistral", kv=2),
    "qwen2": Family("qwen2", kv=2),
    "qwen3": Family("qwen3", kv=2),
    "gemma2": Family("gemma2", kv=2, settings=(*GEMMA, ("tie_word_embeddings", True))),
    "gemma3": Family("gemma3_text", kv=1, settings=GEMMA),
    "opt": OPT,
    "phi3": PHI3,
    "gpt-neox": Family(
        "gpt_neox", block="gpt_neox.layers.{i}.", shared=(("attention.query_key_value",), ("mlp.dense_h_to_4h",)),
        value=("attention.query_key_value", (2 * HEAD_DIM, 3 * HEAD_DIM)), value_blocks=HEADS,
        output="attention.dense", inner=(("mlp.dense_h_to_4h", None),), down="mlp.dense_4h_to_h",
        settings=(("rotary_pct", 1.0),),
    ),
    "minicpm3": latent("minicpm3", 48, ("kv_lora_rank", 64), ("qk_rope_head_dim", 16)),
    # vLLM's attention on CPUs takes a latent of 512 + 64 channels only, and with AMX multiples of 32 keys for a head.
    # All layers are without experts.
    "deepseek-v3": latent(
        "deepseek_v3", 64, ("kv_lora_rank", 512), ("qk_rope_head_dim", 64), ("first_k_dense_replace", 2)
    ),
}  # fmt: skip


def model_of(family: Family, layers: int = 2, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A float32 model whose logits depend on every weight: none keeps a tiny or neutral initial value."""
    values = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": family.kv, "head_dim": HEAD_DIM,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "attn_implementation": "eager",
    } | dict(family.settings) | settings  # fmt: skip
    config = AutoConfig.for_model(family.model_type, **{key: v for key, v in values.items() if v is not None})
    torch.manual_seed(seed)
    model = family.auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5 * 1.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """x [..., channels] with each token rounded to integers from -127 to 127 times a scale of its own."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale).to(x.dtype)


def random_permutation(size: int, heads: int = 0, kv: int = 0) -> torch.Tensor:
    """Any permutation of `size`; with heads, one that keeps to them, the same for all that share a key-value head."""
    if not heads:
        return torch.randperm(size, dtype=torch.int32)
    width = size // heads
    inner = torch.stack([torch.randperm(width, dtype=torch.int32) for _ in range(kv)]).repeat_interleave(heads // kv, 0)
    return (inner + torch.arange(heads, dtype=torch.int32)[:, None] * width).flatten()


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linears of all decoder layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (".layers." in f".{name}" or ".h." in name) and "vision" not in name
    }


def write(
    family: Family, out: Path, dtype: torch.dtype = torch.float32, permuted: bool = True, folds: bool = True,
    dense: tuple[str, ...] = (), blocks: int = 1, weights: str = "float", rounded: bool = False, head: bool = False,
    pattern: str = "2:4", int8: bool = False, **settings: object,
) -> PreTrainedModel:  # fmt: skip
    """Write a compressed checkpoint at `out`; returns the pruned model, in float32 and in its own order.

    Args:
        permuted: each linear's input channels have a random permutation, which linears that read one input share.
        folds: False leaves folds out, and lets every linear have any permutation.
        dense: endings of names that are not pruned.
        blocks: permutations of inputs that are not heads keep to this many equal blocks.
        weights: name of the weight format.
        rounded: config.json says that inputs are rounded to int8; then the model's pruned linears round them.
        head: the head is stored in int8, or the embedding that is tied to it.
        int8: linears that are not pruned are stored in int8, and round their inputs as pruned ones do.
    """
    model = model_of(family, **settings)
    pruned = {n: m for n, m in linears(model).items() if not n.endswith(dense or ("\0",))}
    permutations: dict[str, torch.Tensor] = {}
    shared: dict[tuple[str, tuple[str, ...]], torch.Tensor] = {}
    for name, module in pruned.items():
        heads = family.output if folds else "\0"
        if name.endswith(heads):
            permutations[name] = random_permutation(module.in_features, HEADS, family.kv)
            continue
        group = next((g for g in family.shared for part in g if name.endswith(part)), ())
        ending = next((part for part in group if name.endswith(part)), "")
        reader = (name.removesuffix(ending), group)
        if reader not in shared:
            shared[reader] = random_permutation(module.in_features, blocks, blocks)
        permutations[name] = shared[reader]
    weight_format = FORMATS[weights]
    quantization = weight_format.quantization
    units: dict[str, torch.Tensor] = {}
    for name, module in pruned.items():
        p = permutations[name].long() if permuted else torch.arange(module.in_features)
        stored = module.weight.detach().to(dtype)[:, p]
        mask = sparse24.mask_from_bitmask(sparse24.compress(stored, None, PATTERNS[pattern])[1])
        stored, scales = weight_format.quantize(stored * mask, dtype)
        parts = weight_format.encode(stored, mask, scales, PATTERNS[pattern])
        units |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        units[f"{name}.shape"] = torch.tensor([[module.out_features], [module.in_features]])
        if permuted:
            units[f"{name}.input_permutation"] = permutations[name].clone()
        module.weight.data = stored[:, permutation.invert(p)].float()
        if rounded:
            module.register_forward_pre_hook(lambda module, inputs: (round_tokens(inputs[0]),))
    in_int8 = {n: m for n, m in linears(model).items() if int8 and n not in pruned}
    for module in in_int8.values() if rounded else ():
        module.register_forward_pre_hook(lambda module, inputs: (round_tokens(inputs[0]),))
    rows = {f"{name}.weight" for name in in_int8} | ({"model.embed_tokens.weight", "lm_head.weight"} if head else set())
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in pruned and not (name == "lm_head.weight" and tied(model)):
            if name in rows:
                stem = name.removesuffix(".weight")
                scales = tensor.to(dtype).float().abs().amax(1, keepdim=True) / 127
                integers = (tensor.to(dtype).float() / scales).round()
                units |= {f"{stem}.integers": integers.to(torch.int8), f"{stem}.weight_scale": scales}
                tensor.copy_((integers * scales).to(dtype))
                continue
            units[name] = tensor.to(dtype)
            tensor.copy_(tensor.to(dtype))
    ignore = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in pruned]
    schema = RiaSchema(
        sparsity_config=SparsityConfig(ignore=ignore, sparsity_structure=pattern),
        folds=family.folds() if folds else [],
        int8_linears=list(in_int8),
        weights=None if quantization is None else WeightQuantization(**quantization, dtype=name_of(dtype)),
        input_activations=INT8_TOKENS if rounded else None,
        recipe={"method": "magnitude", "permute": "lsa" if permuted else "none"},
    )
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__], "dtype": name_of(dtype),
        "quantization_config": schema.model_dump(),
    }  # fmt: skip
    writer = CheckpointWriter(out, overwrite=True)
    writer.write("all", units)
    writer.finish(["all"], {"config.json": config}, {}, 1 << 40)
    return model


def tied(model: PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)


def export(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Put what the checkpoint stores, in the model's own order, into `model`."""
    reader = Reader(folder)
    modules = dict(model.named_modules())
    for name in reader.sparse_names:
        modules[name].weight.data = reader.linear(name).dense().to(modules[name].weight.dtype)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    """In float64, after a few tokens."""
    torch.manual_seed(5)
    with torch.no_grad():
        return model.double()(torch.randint(3, VOCAB, (2, 9))).logits


def add_tokenizer(folder: Path) -> None:
    """One token for each byte, so that the ids of any text are in the small models' vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)

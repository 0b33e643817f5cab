"""A model with a layer of every kind, and what its checkpoint holds, by the number of a training."""

from dataclasses import dataclass

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import composed_weight_loader, sharded_weight_loader
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

from ria_vllm.checkpoint.folding import fold
from ria_vllm.format import proofs, sparse24
from ria_vllm.format.formats import FLOAT, FP8, INTEGERS, IntFormat, wide_scales
from ria_vllm.format.layer_schema import Experts, Fold, Producer
from ria_vllm.format.pattern import PATTERNS, TWO_OF_FOUR, Pattern
from ria_vllm.format.schema import (
    FP8_TOKENS,
    INT8_TOKENS,
    InputQuantization,
    Proofs,
    RiaSchema,
    SparsityConfig,
    WeightQuantization,
)
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.model.config import RiaConfig

WIDTH, INNER, WORDS, EXPERTS, TOP = 128, 128, 96, 4, 2
AT = "model.moe.{i}.experts"
ENDS = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores linears.

    Attributes:
        format: of those that are pruned. Where it has integers, the head and the embedding are in int8, too.
        inputs: to what they round their inputs.
        int8: the linears that are not pruned are in int8.
        dtype: of all else, but for what vLLM keeps in float32.
    """

    format: WeightFormat = FLOAT
    inputs: InputQuantization | None = None
    pattern: Pattern = TWO_OF_FOUR
    int8: bool = False
    dtype: torch.dtype = torch.float32


FORMATS = {
    "float": Stored(),
    "bfloat16": Stored(dtype=torch.bfloat16),
    "int8": Stored(INTEGERS[8, None], INT8_TOKENS),
    "int4": Stored(INTEGERS[4, None], INT8_TOKENS),
    "int4-g32": Stored(INTEGERS[4, 32], INT8_TOKENS),
    "fp8": Stored(FP8, FP8_TOKENS),
    "int8-g64": Stored(INTEGERS[8, 64], INT8_TOKENS),
    "W8A16": Stored(INTEGERS[8, None]),
    "W4A16": Stored(INTEGERS[4, 128]),
    "int8 in 8:16": Stored(INTEGERS[8, None], INT8_TOKENS, PATTERNS["8:16"]),
    "dense linears in int8": Stored(INTEGERS[8, None], INT8_TOKENS, int8=True),
}


class Scan(torch.nn.Module):
    """No linear, but parameters with loaders like those of Mamba."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(torch.empty(WIDTH), requires_grad=False)
        self.D = torch.nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        negative = composed_weight_loader(sharded_weight_loader(0), lambda x: -torch.exp(x))
        set_weight_attrs(self.A, {"weight_loader": negative})
        set_weight_attrs(self.D, {"weight_loader": sharded_weight_loader(0)})

    def forward(self, x):
        return x * self.D + torch.tanh(x) * self.A


class Mixer(torch.nn.Module):
    """A convolution that is read as in vLLM's mixer of Mamba-2. On CPUs with AVX-512 and BF16, vLLM packs it."""

    def __init__(self):
        super().__init__()
        self.conv1d = ColumnParallelLinear(4, WIDTH, bias=False, params_dtype=torch.bfloat16)
        self.conv1d.weight.data = self.conv1d.weight.data.unsqueeze(1)
        self.register_buffer("conv_weights", self.conv1d.weight.view(-1, 4), persistent=False)

    def forward(self, x):
        return x + x.roll(1, -1) * self.conv_weights.float().sum(1)


class Router(torch.nn.Module):
    """Its parameter is of no linear."""

    def __init__(self):
        super().__init__()
        self.e_score_correction_bias = torch.nn.Parameter(torch.empty(WIDTH), requires_grad=False)

    def forward(self, x):
        return x + torch.tanh(x) * self.e_score_correction_bias


class Model(torch.nn.Module):
    """Embedding, pruned linears, dense ones, experts, a scan, a convolution, norms and a head, one after the other.

    `gate_up` and `qk` are fused of two linears each; `down` and `o` read them. `qk` and `o` stay dense.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": ""},
        orig_to_new_stacked={
            ".gate.": (".gate_up.", 0), ".up.": (".gate_up.", 1), ".q.": (".qk.", 0), ".k.": (".qk.", 1)
        },
    )  # fmt: skip

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config, settings = vllm_config.quant_config, get_current_vllm_config().additional_config
        get_current_vllm_config().compilation_config.static_forward_context.clear()  # one model after the other
        config.apply_vllm_mapper(self.hf_to_vllm_mapper.get_rename_mapper())
        dtype = settings["dtype"]
        linear = {"quant_config": config, "return_bias": False, "params_dtype": dtype}
        self.embed = VocabParallelEmbedding(WORDS, WIDTH, params_dtype=dtype)
        self.block = torch.nn.Module()
        self.block.gate_up = MergedColumnParallelLinear(WIDTH, [INNER] * 2, prefix="block.gate_up", **linear)
        self.block.down = RowParallelLinear(INNER, WIDTH, prefix="block.down", **linear)
        self.block.qk = MergedColumnParallelLinear(WIDTH, [INNER] * 2, prefix="block.qk", **linear)
        self.block.o = ReplicatedLinear(INNER, WIDTH, prefix="block.o", **linear)
        self.moe = torch.nn.ModuleList([torch.nn.Module()])
        self.moe[0].experts = FusedMoEFactory(
            num_experts=EXPERTS, top_k=TOP, hidden_size=WIDTH, intermediate_size=INNER, quant_config=config,
            prefix="moe.0.experts", dp_size=1, pcp_size=1, tp_size=1, params_dtype=dtype,
        )  # fmt: skip
        self.norm = torch.nn.LayerNorm(WIDTH, dtype=dtype)  # torch's own, whose tensors require gradients
        self.scan, self.mixer, self.router = Scan(), Mixer(), Router()
        head = ParallelLMHead(WORDS, WIDTH, params_dtype=dtype)
        self.tied = settings["tied"]
        self.head = head.tie_weights(self.embed) if self.tied else head

    def load_weights(self, weights):
        experts = self.moe[0].experts.routed_experts

        def others():
            for name, tensor in weights:
                if not name.startswith("model.moe.0.experts."):
                    yield name, tensor
                    continue
                number, end, _ = name.split(".")[4:]
                parameter = experts.w2_weight if end == "w2" else experts.w13_weight
                parameter.weight_loader(parameter, tensor, name, shard_id=end, expert_id=int(number))

        return AutoWeightsLoader(self).load_weights(others(), mapper=self.hf_to_vllm_mapper)

    def forward(self, ids):
        x, block = self.embed(ids), self.block
        gate, up = block.gate_up(x).chunk(2, -1)
        x = self.norm(x + block.down(torch.tanh(gate) * up))
        q, k = block.qk(x).chunk(2, -1)
        x = self.norm(x + block.o(torch.tanh(q) * k))
        generator = torch.Generator().manual_seed(2)
        chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in ids]).int()
        experts = self.moe[0].experts.routed_experts
        x = x + experts.quant_method.apply(experts, x.clone(), torch.rand(len(ids), TOP) * 0 + 0.5, chosen, None, None)
        return self.router(self.mixer(self.scan(self.norm(x).float()))).to(x.dtype)

    def compute_logits(self, x):
        return self.head.quant_method.apply(self.head, x)[:, :WORDS]


PRUNED = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
DENSE = [f"model.block.{name}" for name in ("q", "k", "o")]


class Checkpoint:
    """Tensors by name, of each training. The masks' permutations are always the same.

    Args:
        pruned_experts: otherwise they are dense.
        tied: the head has the embedding's weights.
    """

    def __init__(self, stored=FORMATS["float"], pruned_experts=True, tied=False):
        self.stored, self.pruned_experts, self.tied = stored, pruned_experts, tied
        self.weight_format = stored.format
        rng = torch.Generator().manual_seed(7)
        shared, own = torch.randperm(WIDTH, generator=rng), torch.randperm(INNER, generator=rng)
        self.permutations = {f"model.block.{name}": own if name == "down" else shared for name in PRUNED}
        if pruned_experts:
            shared = torch.randperm(WIDTH, generator=rng)
            for e in range(EXPERTS):
                self.permutations |= {f"model.moe.0.experts.{e}.{end}": shared for end in ("w1", "w3")}
                self.permutations[f"model.moe.0.experts.{e}.w2"] = torch.randperm(INNER, generator=rng)

    @property
    def head(self):
        """The matrix that the head has."""
        return "model.embed" if self.tied else "model.head"

    @property
    def in_int8(self):
        """The matrices that are not pruned and in int8."""
        outside = {"model.embed", self.head} if isinstance(self.weight_format, IntFormat) else set()
        return sorted(outside) + DENSE * self.stored.int8

    def tensors(self, training):
        rng = torch.Generator().manual_seed(training)

        def random(*shape):
            return torch.randn(*shape, generator=rng) / shape[-1] ** 0.5

        found = {"model.embed.weight": random(WORDS, WIDTH) * 8}
        for name in (*PRUNED, "q", "k", "o"):
            found[f"model.block.{name}.weight"] = random(WIDTH, INNER)
            found[f"model.block.{name}.bias"] = random(WIDTH)
        for e in range(EXPERTS):
            found |= {f"model.moe.0.experts.{e}.{end}.weight": random(WIDTH, INNER) for end in ENDS.values()}
        found |= {"model.scan.A": random(WIDTH), "model.scan.D": random(WIDTH), "model.norm.weight": 1 + random(WIDTH)}
        found["model.norm.bias"] = random(WIDTH)
        found["model.mixer.conv1d.weight"] = random(WIDTH, 1, 4).bfloat16()
        found["model.router.e_score_correction_bias"] = random(WIDTH)
        if not self.tied:
            found["model.head.weight"] = random(WORDS, WIDTH)
        for name in self.in_int8:
            weight = found.pop(f"{name}.weight")
            scales = weight.abs().amax(1, keepdim=True) / 127
            integers = (weight / scales).round().to(torch.int8)
            found |= {f"{name}.integers": integers, f"{name}.weight_scale": scales}
        for linear in self.permutations:
            parts = self.parts(found.pop(f"{linear}.weight"))
            found |= {f"{linear}.{part}": tensor for part, tensor in parts.items()}
        wide = ("model.scan.", "model.router.")
        held = {name for name, one in found.items() if one.dtype == torch.float32 and not name.startswith(wide)}
        return {name: tensor.to(self.stored.dtype) if name in held else tensor for name, tensor in found.items()}

    def parts(self, weight):
        """What is stored of a linear whose largest weights are kept, float32 [out, in] in the stored order."""
        pattern = self.stored.pattern
        mask = sparse24.mask_from_bitmask(sparse24.compress(weight, None, pattern)[1])
        values, scales = self.weight_format.quantize(weight * mask, torch.float32)
        parts = self.weight_format.encode(values, mask, scales, pattern)
        return parts | {"shape": torch.tensor([[len(weight)], [INNER]])}

    def decoded(self, linear, tensors):
        """A pruned linear, float32 [out, in] in the stored order."""
        parts = {one.name: tensors[f"{linear}.{one.name}"] for one in self.weight_format.parts}
        return self.weight_format.decode(parts, torch.float32)

    def proofs(self, tensors):
        """By the formula, of plain matrices in the model's own order of channels."""
        schema, found = self.schema(), {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".")
            if part == "bitmask":
                stored = self.decoded(module, tensors)
                tensor = torch.empty_like(stored)
                tensor[:, self.permutations[module]] = stored
            elif part == "integers":
                tensor = tensor * tensors[f"{module}.weight_scale"]
            elif part != "weight" or tensor.dim() < 2:
                continue
            tensor = tensor.flatten(1)
            found[module] = proofs.proof(tensor, schema.proof_vector(tensor.shape[1]))
            if schema.proved_transposed(module):
                found[module + proofs.TRANSPOSED] = proofs.proof(tensor.T, schema.proof_vector(len(tensor)))
        return found

    def schema(self):
        up, gate, down = (f"{AT}.{{e}}.{ENDS[end]}" for end in ("up", "gate", "down"))
        experts = Experts(module=AT, num_experts=EXPERTS, gate=gate, up=up, down=down)
        folds = [
            Fold(consumer=consumer, producers=[Producer(name=name) for name in producers], coupling="elementwise")
            for consumer, *producers in (("model.block.down", "model.block.gate", "model.block.up"), (down, gate, up))
        ]
        quantization = self.weight_format.quantization
        return RiaSchema(
            sparsity_config=SparsityConfig(sparsity_structure=str(self.stored.pattern)),
            proofs=Proofs(seed=1, digest="0" * 64),
            folds=folds if self.pruned_experts else folds[:1],
            experts=[experts] if self.pruned_experts else [],
            weights=None if quantization is None else WeightQuantization(**quantization, dtype="float32"),
            input_activations=self.stored.inputs, int8_linears=DENSE * self.stored.int8,
        )  # fmt: skip

    def config(self):
        config = RiaConfig(schema := self.schema())
        self.read(config)
        config.permutations = {name: p.int().numpy() for name, p in self.permutations.items()}
        config.folding = fold(schema, config.permutations, config.pruned.__contains__, "here")
        config.packed_modules_mapping = {"gate_up": ["gate", "up"], "qk": ["q", "k"]}
        return config

    def read(self, config):
        """What a configuration reads in the files' headers."""
        tensors = self.tensors(0)
        config._read_names(list(tensors))
        config.names = {name: name for name in config.stored}


def _theirs(form, sparsity, weights=None, inputs=None):
    """A `quantization_config` of compressed-tensors, for the linears that are pruned."""
    targets = [f"re:.*{end}$" for end in PRUNED]
    group = {"targets": targets, "weights": weights, "input_activations": inputs}
    sparsity = {"sparsity_config": {"format": sparsity, "sparsity_structure": "2:4", "targets": targets}}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group} if weights else {},
    } | (sparsity if form != "marlin-24" else {})  # fmt: skip


_INT, _FP8 = ({"num_bits": 8, "type": kind, "symmetric": True} for kind in ("int", "float"))
_GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
# Unlike the model's, which is float32.
SCALES = {"compressed-tensors, int8-g64": torch.float16, "pack-quantized": torch.bfloat16}
FOREIGN = {
    "compressed-tensors": _theirs(None, "sparse-24-bitmask"),
    "compressed-tensors, fp8 by tensor": _theirs(
        "float-quantized", "sparse-24-bitmask", _FP8 | {"strategy": "tensor"},
        _FP8 | {"strategy": "tensor", "dynamic": False},
    ),
    "compressed-tensors, int8 with zeros": _theirs(
        "int-quantized", "dense", _INT | {"strategy": "channel"}, _INT | {"strategy": "token", "dynamic": True}
    ),
    "compressed-tensors, int8-g64": _theirs("int-quantized", "sparse-24-bitmask", _GROUPS | {"num_bits": 8}),
    "pack-quantized": _theirs("pack-quantized", "dense", _GROUPS),
    "marlin-24": _theirs("marlin-24", None, _GROUPS | {"group_size": 128}),
}  # fmt: skip


class Foreign(Checkpoint):
    """As compressed-tensors has it: no permutations, no proofs, and dense experts.

    Args:
        form: one of `FOREIGN`.
    """

    def __init__(self, form="compressed-tensors", tied=False):
        super().__init__(pruned_experts=False, tied=tied)
        self.permutations = {name: torch.arange(INNER) for name in self.permutations}
        self.form = form

    def parts(self, weight):
        if self.form == "marlin-24":
            return _tiled(weight)
        compressed, bitmask = sparse24.compress(weight)
        mask, largest = sparse24.mask_from_bitmask(bitmask), compressed.abs().amax(1, keepdim=True)
        if "zeros" in self.form:
            return {"weight": (weight * mask / largest * 127).round().to(torch.int8), "weight_scale": largest / 127}
        if "fp8" in self.form:
            scale = largest.amax() / FP8.largest
            parts = FP8.encode(weight, mask, scale.expand(len(weight), 1))
            return parts | {"weight_scale": scale[None], "input_scale": torch.ones(1)}
        if dtype := SCALES.get(self.form):
            stored = INTEGERS[4 if self.form == "pack-quantized" else 8, 64]
            scales = ((weight * mask).unflatten(1, (-1, 64)).abs().amax(-1) / stored.largest).to(dtype)
            if self.form != "pack-quantized":
                return stored.encode(weight, mask, scales)
            integers = (weight * mask / wide_scales(scales, INNER)).round().to(torch.int8)
            return {"weight_packed": stored.pack(integers).view(torch.int32), "weight_scale": scales}
        return {"compressed": compressed, "bitmask": bitmask, "shape": torch.tensor([[len(weight)], [INNER]])}

    def config(self):
        config = RiaConfig.from_config(FOREIGN[self.form])
        self.read(config)
        return config


def _tiled(weight):
    """What Marlin-24 reads: any integers, and any two of four positions. Both are made of a weight's bits."""
    rows, columns = weight.shape
    bits = weight.view(torch.int32).flatten() >> 3
    two = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE])[bits[: rows * columns // 4] % 6].view(columns // 32, -1, 4)
    words = (bits[: rows * columns // 16].long() * 40503 << 8).to(torch.int32)
    return {
        "weight_packed": words.view(columns // 32, rows * 2),
        "scale_packed": weight.abs().amax(1)[None].half() / 8,
        "meta": (two << torch.tensor([0, 4, 8, 12])).sum(-1).to(torch.int16),
    }

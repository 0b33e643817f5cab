"""A model with a layer of every kind that vLLM reloads, and what its checkpoint holds, by the number of a training."""

import torch
from torch.nn.functional import rms_norm
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
from ria_vllm.format.formats import FLOAT, INTEGERS
from ria_vllm.format.layer_schema import Experts, Fold, Producer
from ria_vllm.format.schema import INT8_TOKENS, Proofs, RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.serve.model.config import RiaConfig

WIDTH, INNER, WORDS, EXPERTS, TOP = 128, 128, 96, 4, 2
AT = "model.moe.{i}.experts"
ENDS = {"gate": "w1", "up": "w3", "down": "w2"}
FORMATS = {"float": FLOAT, "int8": INTEGERS[8, None], "int4": INTEGERS[4, None], "int4-g32": INTEGERS[4, 32]}


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
        self.register_buffer("conv_weights", self.conv1d.weight.view(WIDTH, 4), persistent=False)

    def forward(self, x):
        return x + x.roll(1, -1) * self.conv_weights.float().sum(1)


class Router(torch.nn.Module):
    """vLLM's reloads write a parameter of this name at once."""

    def __init__(self):
        super().__init__()
        self.e_score_correction_bias = torch.nn.Parameter(torch.empty(WIDTH), requires_grad=False)

    def forward(self, x):
        return x + torch.tanh(x) * self.e_score_correction_bias


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x):
        return rms_norm(x, [WIDTH], self.weight)


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
        linear = {"quant_config": config, "return_bias": False, "params_dtype": torch.float32}
        self.embed = VocabParallelEmbedding(WORDS, WIDTH, params_dtype=torch.float32)
        self.block = torch.nn.Module()
        self.block.gate_up = MergedColumnParallelLinear(WIDTH, [INNER] * 2, prefix="block.gate_up", **linear)
        self.block.down = RowParallelLinear(INNER, WIDTH, prefix="block.down", **linear)
        self.block.qk = MergedColumnParallelLinear(WIDTH, [INNER] * 2, prefix="block.qk", **linear)
        self.block.o = ReplicatedLinear(INNER, WIDTH, prefix="block.o", **linear)
        self.moe = torch.nn.ModuleList([torch.nn.Module()])
        self.moe[0].experts = FusedMoEFactory(
            num_experts=EXPERTS, top_k=TOP, hidden_size=WIDTH, intermediate_size=INNER, quant_config=config,
            prefix="moe.0.experts", dp_size=1, pcp_size=1, tp_size=1, params_dtype=torch.float32,
        )  # fmt: skip
        self.scan, self.norm, self.mixer, self.router = Scan(), Norm(), Mixer(), Router()
        head = ParallelLMHead(WORDS, WIDTH, params_dtype=torch.float32)
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
        return self.router(self.mixer(self.scan(self.norm(x))))

    def compute_logits(self, x):
        return self.head.quant_method.apply(self.head, x)[:, :WORDS]


PRUNED = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}


class Checkpoint:
    """Tensors by name, of each training. The masks' orders are always the same.

    Args:
        weight_format: of what is pruned.
        pruned_experts: otherwise they are dense.
        tied: the head has the embedding's weights.
    """

    def __init__(self, weight_format=FLOAT, pruned_experts=True, tied=False):
        self.weight_format, self.pruned_experts, self.tied = weight_format, pruned_experts, tied
        rng = torch.Generator().manual_seed(7)
        shared, own = torch.randperm(WIDTH, generator=rng), torch.randperm(INNER, generator=rng)
        self.orders = {f"model.block.{name}": own if name == "down" else shared for name in PRUNED}
        if pruned_experts:
            shared = torch.randperm(WIDTH, generator=rng)
            for e in range(EXPERTS):
                self.orders |= {f"model.moe.0.experts.{e}.{end}": shared for end in ("w1", "w3")}
                self.orders[f"model.moe.0.experts.{e}.w2"] = torch.randperm(INNER, generator=rng)

    @property
    def head(self):
        """The matrix that the head has. Where pruned linears have integers, it has them, too."""
        return "model.embed" if self.tied else "model.head"

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
        found["model.mixer.conv1d.weight"] = random(WIDTH, 1, 4).bfloat16()
        found["model.router.e_score_correction_bias"] = random(WIDTH)
        if not self.tied:
            found["model.head.weight"] = random(WORDS, WIDTH)
        if self.weight_format != FLOAT:
            weight = found.pop(f"{self.head}.weight")
            scales = weight.abs().amax(1, keepdim=True) / 127
            integers = (weight / scales).round().to(torch.int8)
            found |= {f"{self.head}.integers": integers, f"{self.head}.weight_scale": scales}
        for linear in self.orders:
            weight = found.pop(f"{linear}.weight")
            mask = sparse24.mask_from_bitmask(sparse24.compress(weight)[1])
            stored, scales = self.weight_format.quantize(weight * mask, torch.float32)
            parts = self.weight_format.encode(stored, mask, scales) | {"shape": torch.tensor([[len(weight)], [INNER]])}
            found |= {f"{linear}.{part}": tensor for part, tensor in parts.items()}
        return found

    def proofs(self, tensors):
        """By the formula, of plain matrices in the model's own order of channels."""
        schema, found = self.schema(), {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".")
            if part == "bitmask":
                parts = {one.name: tensors[f"{module}.{one.name}"] for one in self.weight_format.parts}
                stored = self.weight_format.decode(parts, torch.float32)
                tensor = torch.empty_like(stored)
                tensor[:, self.orders[module]] = stored
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
            sparsity_config=SparsityConfig(), proofs=Proofs(seed=1, digest="0" * 64),
            folds=folds if self.pruned_experts else folds[:1],
            experts=[experts] if self.pruned_experts else [],
            weights=None if quantization is None else WeightQuantization(**quantization, dtype="float32"),
            input_activations=None if quantization is None else INT8_TOKENS,
        )  # fmt: skip

    def config(self):
        config = RiaConfig(schema := self.schema())
        config._read_names(list(self.tensors(0)))
        config.names = {name: name for name in config.stored}
        config.permutations = {name: order.int().numpy() for name, order in self.orders.items()}
        config.folding = fold(schema, config.permutations, config.pruned.__contains__, "here")
        config.packed_modules_mapping = {"gate_up": ["gate", "up"], "qk": ["q", "k"]}
        return config

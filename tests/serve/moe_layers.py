"""One MoE layer of vLLM with pruned experts, and what it must compute, in float64 from the plain weights."""

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from ria_vllm.checkpoint.folding import fold
from ria_vllm.format import permutation
from ria_vllm.format.formats import FLOAT, FP8
from ria_vllm.format.layer_schema import Experts, Fold, Producer, Stacked
from ria_vllm.format.pattern import PATTERNS
from ria_vllm.format.schema import FP8_TOKENS, INT8_TOKENS, RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.format.sparse24 import compress, mask_from_bitmask
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.served_model import ServedModel

HIDDEN, INNER, EXPERTS, TOP = 128, 128, 4, 2
AT = "model.layers.{i}.mlp.experts"
LAYER = "model.layers.1.mlp.experts"
KINDS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def silu(gate, up):
    return gate * torch.sigmoid(gate) * up


def swigluoai(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class StoredMoE:
    """Random experts of one layer: the tensors of the files, and the plain matrices that they stand for.

    permuted: gate and up of all experts share a random permutation of their input channels, each down has its own.
    """

    def __init__(
        self, permuted=True, weight_format=FLOAT, bias=False, seed=0, folds=True, rounded=False, pattern="2:4"
    ):
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors, self.plain, self.permutations, self.bias = {}, {}, {}, {}
        self.weight_format, self.folds, self.has_bias, self.rounded = weight_format, folds, bias, rounded
        self.pattern = PATTERNS[pattern]
        shared = torch.randperm(HIDDEN, generator=self.rng)
        for e in range(EXPERTS):
            for kind, end in KINDS.items():
                rows, columns = (HIDDEN, INNER) if kind == "down" else (INNER, HIDDEN)
                p = torch.randperm(columns, generator=self.rng)
                p = p if kind == "down" else shared
                self._add(f"{LAYER}.{e}.{end}", rows, columns, p if permuted else None)
        if bias:
            both = torch.randn(EXPERTS, 2 * INNER, generator=self.rng)
            self.tensors[f"{LAYER}.gate_up_proj_bias"] = both
            self.tensors[f"{LAYER}.down_proj_bias"] = torch.randn(EXPERTS, HIDDEN, generator=self.rng)
            for e in range(EXPERTS):
                self.bias[f"{LAYER}.{e}.gate_proj"], self.bias[f"{LAYER}.{e}.up_proj"] = both[e, ::2], both[e, 1::2]
                self.bias[f"{LAYER}.{e}.down_proj"] = self.tensors[f"{LAYER}.down_proj_bias"][e]

    def _add(self, name, rows, columns, p):
        weight = torch.randn(rows, columns, generator=self.rng) / columns**0.5 * 1.5
        mask = mask_from_bitmask(compress(weight, None, self.pattern)[1])
        weight, scales = self.weight_format.quantize(weight * mask, torch.float32)
        parts = self.weight_format.encode(weight, mask, scales, self.pattern)
        self.tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        self.tensors[f"{name}.shape"] = torch.tensor([[rows], [columns]])
        self.plain[name] = weight.double()
        if p is not None:
            self.plain[name] = self.plain[name][:, permutation.invert(p)]
            self.permutations[name] = p.int().numpy()

    def config(self):
        experts = Experts(
            module=AT, num_experts=EXPERTS, **{kind: f"{AT}.{{e}}.{end}" for kind, end in KINDS.items()},
            stacked=[
                Stacked(tensor=f"{AT}.gate_up_proj", bias=f"{AT}.gate_up_proj_bias", linears=["gate", "up"],
                        interleaved=True, transposed=True),
                Stacked(tensor=f"{AT}.down_proj", bias=f"{AT}.down_proj_bias", linears=["down"], transposed=True),
            ] if self.has_bias else [],
        )  # fmt: skip
        rule = Fold(
            consumer=experts.down, producers=[Producer(name=experts.gate), Producer(name=experts.up)],
            coupling="elementwise",
        )  # fmt: skip
        quantization = self.weight_format.quantization
        schema = RiaSchema(
            sparsity_config=SparsityConfig(sparsity_structure=str(self.pattern)),
            experts=[experts], folds=[rule] if self.folds else [],
            weights=None if quantization is None else WeightQuantization(**quantization, dtype="float32"),
            input_activations=(FP8_TOKENS if self.weight_format == FP8 else INT8_TOKENS) if self.rounded else None,
        )  # fmt: skip
        config = RiaConfig(schema)
        config._read_names(list(self.tensors))
        config.names = {name: name for name in config.stored}
        config.permutations = dict(self.permutations)
        config.folding = fold(schema, self.permutations, config.pruned.__contains__, "here")
        config.packed_modules_mapping = {}
        return config

    def expected(self, x, weights, ids, act=silu, on_input=False):
        """x [T, H], weights and ids [T, k] -> float64 [T, H]."""
        y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
        for token in range(len(x)):
            for weight, e in zip(weights[token].double(), ids[token].tolist()):
                t = x[token].double() * (weight if on_input else 1)
                products = {k: self._product(f"{LAYER}.{e}.{end}", t) for k, end in KINDS.items() if k != "down"}
                result = self._product(f"{LAYER}.{e}.down_proj", act(products["gate"], products["up"]))
                y[token] += result * (1 if on_input else weight)
        return y

    def _product(self, name, x):
        return self.plain[name] @ x + (self.bias[name].double() if name in self.bias else 0)


class Layer(torch.nn.Module):
    def __init__(self, config, prefix, **settings):
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = FusedMoEFactory(
            **{
                "num_experts": EXPERTS, "top_k": TOP, "hidden_size": HIDDEN, "intermediate_size": INNER,
                "quant_config": config, "prefix": prefix, "dp_size": 1, "pcp_size": 1, "tp_size": 1,
                "params_dtype": torch.float32,
            } | settings
        )  # fmt: skip


class Model(torch.nn.Module):
    """Two layers, of which the second has experts, with a mapper like those of vLLM's own models."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.": ""})

    def __init__(self, config, prefix="layers.1.mlp.experts", **settings):
        super().__init__()
        get_current_vllm_config().compilation_config.static_forward_context.clear()  # one model after the other
        config.apply_vllm_mapper(self.hf_to_vllm_mapper)
        self.layers = torch.nn.ModuleList([torch.nn.Identity(), Layer(config, prefix, **settings)])

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    @property
    def experts(self):
        return self.layers[1].mlp.experts.routed_experts


def attached(config, model):
    """`model` as vLLM's plugin leaves it."""
    ServedModel(config, model, None)
    return model


def served(stored, **settings):
    """A loaded layer of this rank."""
    config = stored.config()
    model = attached(config, Model(config, **settings))
    model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    return model


def route(tokens=7, seed=3):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=rng)[:TOP] for _ in range(tokens)]).int()
    return torch.randn(tokens, HIDDEN, generator=rng), torch.rand(tokens, TOP, generator=rng) + 0.2, ids


def run(model, x, weights, ids):
    copies = [tensor.clone() for tensor in (x, weights, ids)]  # vLLM's experts write into their arguments
    return model.experts.quant_method.apply(model.experts, *copies, None, None)


def play_rank(monkeypatch, rank, size):
    monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: rank)

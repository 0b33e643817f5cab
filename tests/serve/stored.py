"""Random pruned linears, for tests of single layers of vLLM."""

import torch

from ria_vllm.checkpoint.folding import fold
from ria_vllm.format import permutation, sparse24
from ria_vllm.format.formats import FLOAT, FP8
from ria_vllm.format.pattern import PATTERNS
from ria_vllm.format.schema import FP8_TOKENS, INT8_TOKENS, RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.serve.model.config import RiaConfig


class Stored:
    """Random pruned linears: what the checkpoint holds, and the plain matrix it stands for.

    rounded: config.json says that activations are rounded to int8, or to fp8 if the weights are.
    """

    def __init__(self, seed=0, weight_format=FLOAT, rounded=False, pattern="2:4"):
        self.rng = torch.Generator().manual_seed(seed)
        self.weight_format, self.rounded, self.pattern = weight_format, rounded, pattern
        self.tensors, self.plain, self.bias, self.permutations = {}, {}, {}, {}

    def add(self, name, rows, columns, p=None):
        weight = torch.randn(rows, columns, generator=self.rng) / columns**0.5
        mask = sparse24.mask_from_bitmask(sparse24.compress(weight, None, PATTERNS[self.pattern])[1])
        stored, scales = self.weight_format.quantize(weight * mask, torch.float32)
        parts = self.weight_format.encode(stored, mask, scales, PATTERNS[self.pattern])
        self.tensors[name] = parts | {"shape": torch.tensor([[rows], [columns]])}
        self.plain[name] = stored if p is None else stored[:, permutation.invert(p).long()]
        self.bias[name] = torch.randn(rows, generator=self.rng)
        if p is not None:
            self.permutations[name] = p.numpy()

    def permutation(self, size):
        return torch.randperm(size, generator=self.rng).int()

    def apply(self, x, name):
        return x.double() @ self.plain[name].double().T + self.bias[name].double()

    def config(self, folds=(), ignore=()):
        quantization = self.weight_format.quantization
        schema = RiaSchema(
            sparsity_config=SparsityConfig(ignore=list(ignore), sparsity_structure=self.pattern), folds=list(folds),
            weights=None if quantization is None else WeightQuantization(**quantization, dtype="float32"),
            input_activations=(FP8_TOKENS if self.weight_format == FP8 else INT8_TOKENS) if self.rounded else None,
        )  # fmt: skip
        config = RiaConfig(schema)
        config.pruned, config.required = set(self.tensors), set(self.tensors)
        config.stored = set(self.tensors)
        config.names = {name: name for name in self.tensors}
        config.permutations = dict(self.permutations)
        config.folding = fold(config.schema, self.permutations, config.pruned.__contains__, "here")
        config.packed_modules_mapping = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
        return config

    def load(self, layer, linears):
        """`linears`: name of the stored linear -> shard id."""
        for name, shard in linears.items():
            arguments = () if shard is None else (shard,)
            for part, tensor in self.tensors[name].items():
                if part != "shape":
                    getattr(layer, part).weight_loader(getattr(layer, part), tensor, *arguments)
            layer.bias.weight_loader(layer.bias, self.bias[name], *arguments)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

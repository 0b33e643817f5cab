"""Random pruned linears, for tests of single layers of vLLM."""

import torch

from ria_vllm import permutation, sparse24
from ria_vllm.schema import RiaSchema, SparsityConfig
from ria_vllm.serve.config import RiaConfig
from ria_vllm.serve.folding import fold


class Stored:
    """Random pruned linears: what the checkpoint holds, and the plain matrix it stands for."""

    def __init__(self, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors, self.plain, self.bias, self.orders = {}, {}, {}, {}

    def add(self, name, rows, columns, order=None):
        compressed, bitmask = sparse24.compress(torch.randn(rows, columns, generator=self.rng) / columns**0.5)
        stored = sparse24.decompress(compressed, bitmask)
        self.tensors[name] = {"compressed": compressed, "bitmask": bitmask, "shape": torch.tensor([[rows], [columns]])}
        self.plain[name] = stored if order is None else stored[:, permutation.invert(order).long()]
        self.bias[name] = torch.randn(rows, generator=self.rng)
        if order is not None:
            self.orders[name] = order.numpy()

    def order(self, size):
        return torch.randperm(size, generator=self.rng).int()

    def apply(self, x, name):
        return x.double() @ self.plain[name].double().T + self.bias[name].double()

    def config(self, folds=(), ignore=()):
        config = RiaConfig(RiaSchema(sparsity_config=SparsityConfig(ignore=list(ignore)), folds=list(folds)))
        config.pruned, config.required = set(self.tensors), set(self.tensors)
        config.stored = set(self.tensors)
        config.names = {name: name for name in self.tensors}
        config.permutations = dict(self.orders)
        config.folding = fold(config.schema, self.orders, config.pruned.__contains__, "here")
        config.packed_modules_mapping = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
        return config

    def load(self, layer, linears):
        """`linears`: name of the stored linear -> shard id."""
        for name, shard in linears.items():
            arguments = () if shard is None else (shard,)
            for part, tensor in self.tensors[name].items():
                getattr(layer, part).weight_loader(getattr(layer, part), tensor, *arguments)
            layer.bias.weight_loader(layer.bias, self.bias[name], *arguments)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

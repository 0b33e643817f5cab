"""Linears of compressed-tensors' checkpoints, quantized, for vLLM's own layers."""

import torch
from vllm.model_executor.layers.linear import ReplicatedLinear

from ria_vllm.format import sparse24
from ria_vllm.format.token_rounding import FP8_DTYPE, LARGEST_FP8
from ria_vllm.serve.model.config import RiaConfig

FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
INT = {"num_bits": 8, "type": "int", "symmetric": True}
BY_TOKEN = FLOAT | {"strategy": "token", "dynamic": True}
BY_TENSOR = FLOAT | {"strategy": "tensor", "dynamic": False}


class Checkpoint:
    """One group of quantized linears of compressed-tensors; `plain` is what each stands for, in float64.

    `sparse`: which linears config.json calls 2:4.
    """

    def __init__(self, weights=FLOAT, inputs=BY_TOKEN, strategy="channel", dense=False, sparse="Linear"):
        self.weights, self.strategy, self.dense, self.sparse = weights, strategy, dense, sparse
        weights = weights | {"strategy": strategy}
        self.group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        self.plain = {}

    def config(self, **groups):
        config = RiaConfig.from_config(
            {
                "quant_method": "compressed-tensors",
                "sparsity_config": {
                    "format": "dense" if self.dense else "sparse-24-bitmask",
                    "sparsity_structure": "2:4",
                    "targets": [self.sparse],
                },
                "config_groups": groups or {"group_0": self.group},
            }
        )
        config.packed_modules_mapping = {"gate_up": ["gate", "up"]}
        return config

    def tensors(self, name, rows, columns, seed=0, two_of_four=True):
        """What the checkpoint holds of a linear; without `two_of_four` it is dense, as if by mistake."""
        generator = torch.Generator().manual_seed(len(name) + rows + 1000 * seed)
        whole_matrix = torch.randn(rows, columns, generator=generator)
        compressed, bitmask = sparse24.compress(whole_matrix) if two_of_four else (whole_matrix, None)
        largest = (
            compressed.abs().amax(1, keepdim=True) if self.strategy == "channel" else compressed.abs().amax()[None]
        )
        whole = self.weights["type"] == "int"
        scale = largest / (127 if whole else LARGEST_FP8)
        values = compressed / scale
        values = values.round().to(torch.int8) if whole else values.to(FP8_DTYPE)
        self.plain[name] = _spread(values.double() * scale.double(), bitmask)
        stored = {"compressed": values, "bitmask": bitmask}
        if self.dense:
            stored = {"weight": _spread(values.float(), bitmask).to(values.dtype)}
        return stored | {"weight_scale": scale}

    def stream(self, layer, linears, **which):
        """`linears`: name -> shard id, rows. `which`: arguments of `tensors`."""
        for name, (shard, rows) in linears.items():
            for part, tensor in self.tensors(name, rows, layer.input_size, **which).items():
                parameter = getattr(layer, part)
                parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))

    def load(self, layer, linears, **which):
        self.stream(layer, linears, **which)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    def single(self, columns=128, dtype=torch.bfloat16):
        layer = ReplicatedLinear(
            columns, 64, bias=False, quant_config=self.config(), prefix="fc", params_dtype=dtype, return_bias=False
        )
        return self.load(layer, {"fc": (None, 64)})


def _spread(values, bitmask):
    return values if bitmask is None else sparse24.decompress(values, bitmask)

"""A small model made of vLLM's layers, whose prefixes need not be their paths."""

import tiny
import torch
from stored import Stored
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.serve.served_model import ServedModel

HIDDEN = tiny.HIDDEN
PREFIX, INNER = "model.layers.0", 256


class Block(torch.nn.Module):
    """A layer of the model, whose linears have the given prefixes."""

    def __init__(self, config, prefixes, quantized=True):
        super().__init__()
        quant_config = config if quantized else None
        self.gate_up = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], quant_config=quant_config, prefix=prefixes[0], return_bias=False
        )
        self.down = RowParallelLinear(INNER, HIDDEN, quant_config=quant_config, prefix=prefixes[1], return_bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(gate * up)


class Model(torch.nn.Module):
    """One layer, with mappers like those of vLLM's own models."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": ""}, orig_to_new_stacked={".gate": (".gate_up", 0), ".up": (".gate_up", 1)}
    )

    def __init__(self, config, prefixes=("wrong.gate_up", "wrong.down"), quantized=True):
        super().__init__()
        config.apply_vllm_mapper(self.hf_to_vllm_mapper.get_rename_mapper())
        self.layers = torch.nn.ModuleList([Block(config, prefixes, quantized)])

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


FOLD = Fold(
    consumer="model.layers.{i}.down",
    producers=[Producer(name="model.layers.{i}.gate"), Producer(name="model.layers.{i}.up")],
    coupling="elementwise",
)


def stored_model():
    """What the checkpoint holds of `Model`."""
    stored = Stored()
    shared = stored.permutation(HIDDEN)
    for name in ("gate", "up"):
        stored.add(f"{PREFIX}.{name}", INNER, HIDDEN, shared)
    stored.add(f"{PREFIX}.down", HIDDEN, INNER, stored.permutation(INNER))
    return stored


def tensors(stored):
    for name, parts in stored.tensors.items():
        yield from ((f"{name}.{part}", tensor.clone()) for part, tensor in parts.items())
        yield f"{name}.bias", stored.bias[name].clone()


def attached(config, model):
    """`model` as vLLM's plugin leaves it."""
    ServedModel(config, model, None)
    return model


def finished(model):
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.quant_method.process_weights_after_loading(module)
    return model


def expected(stored, x):
    gate, up = stored.apply(x, f"{PREFIX}.gate"), stored.apply(x, f"{PREFIX}.up")
    return stored.apply(gate * up, f"{PREFIX}.down")

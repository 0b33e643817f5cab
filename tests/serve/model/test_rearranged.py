"""Rows that a model of vLLM rearranges: what its layers compute, against the dense weights loaded by the same model."""

import pytest
import torch
from gated_model import finished
from stored import Stored
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.models.utils import AutoWeightsLoader

from ria_vllm.errors import RiaError
from ria_vllm.format import permutation, sparse24
from ria_vllm.format.formats import INT8
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.format.schema import WeightQuantization
from ria_vllm.serve.served_model import ServedModel

HEADS, WIDTH, HIDDEN = 4, 32, 128


class Fused(torch.nn.Module):
    """q, k and v of each head lie together in the file, as in BLOOM. All with `qkv` in their names are rearranged."""

    bias = True

    def __init__(self, config):
        super().__init__()
        self.model = torch.nn.Module()
        options = {"bias": self.bias, "quant_config": config, "return_bias": False}
        self.model.qkv = QKVParallelLinear(HIDDEN, WIDTH, HEADS, prefix="model.qkv", **options)
        self.model.out = RowParallelLinear(HIDDEN, HIDDEN, prefix="model.out", **options)

    def rearrange(self, name, tensor):
        if "qkv" not in name:
            return tensor
        return tensor.view((HEADS, 3, -1) + tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights((name, self.rearrange(name, tensor)) for name, tensor in weights)


class ByFullName(Fused):
    """Rotary halves are dealt, but only in what is called a weight, as in Llama 4."""

    def rearrange(self, name, tensor):
        if not name.endswith("qkv.weight"):
            return tensor
        return tensor.view(3 * HEADS, WIDTH // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


class Unbiased(Fused):
    bias = False


class Inline(Fused):
    """Rearranges where the parameter says that it has outputs, as Falcon does."""

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name not in parameters:
                continue
            parameter = parameters[name]
            if getattr(parameter, "output_dim", None) is not None:
                tensor = self.rearrange(name, tensor)
            parameter.weight_loader(parameter, tensor)


def stored_model():
    stored = Stored()
    stored.add("model.qkv", 3 * HIDDEN, HIDDEN, stored.permutation(HIDDEN))
    stored.add("model.out", HIDDEN, HIDDEN, stored.permutation(HIDDEN))
    return stored


def stored_as_int8(stored):
    """The same linears, rounded; returns the configuration that says so."""
    for name, parts in stored.tensors.items():
        weight, scales = INT8.quantize(sparse24.decompress(parts["compressed"], parts["bitmask"]), torch.float32)
        stored.tensors[name] = parts | INT8.encode(weight, None, scales)
        stored.plain[name] = weight[:, permutation.invert(torch.from_numpy(stored.permutations[name])).long()]
    config = stored.config()
    config.schema.weights = WeightQuantization()
    return config


def tensors(stored, dense=False):
    for name, parts in stored.tensors.items():
        parts = {"weight": stored.plain[name]} if dense else parts
        yield from ((f"{name}.{part}", tensor.clone()) for part, tensor in parts.items())
        yield f"{name}.bias", stored.bias[name].clone()


def built(config, model_class):
    model = model_class(config)
    config.rearranged = True
    ServedModel(config, model, None)
    return model


def check_same(model, dense, stored):
    """A model of the pruned weights computes what one of the same weights, dense, does."""
    model.load_weights(tensors(stored))
    finished(model)
    dense.load_weights(tensors(stored, dense=True))
    finished(dense)
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(model.model.qkv(x), dense.model.qkv(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_class", [Fused, ByFullName, Inline])
@pytest.mark.parametrize("rank", [(0, 1), (1, 2)])
def test_rows_are_where_the_model_puts_those_of_dense_weights(ranks, model_class, rank):
    ranks(*rank)
    stored = stored_model()
    model, dense = built(stored.config(), model_class), model_class(None)
    assert "weight" not in dict(model.model.qkv.named_parameters())
    check_same(model, dense, stored)


@pytest.mark.parametrize("rank", [(0, 1), (1, 2)])
def test_scales_go_with_their_rows(ranks, rank):
    ranks(*rank)
    stored = stored_model()
    model, dense = built(stored_as_int8(stored), Fused), Fused(None)
    check_same(model, dense, stored)


def test_a_tensor_that_no_layer_has_a_place_for(ranks):
    model = built(stored_model().config(), Unbiased)
    with pytest.raises(RiaError, match="model.qkv.bias: no layer of vLLM's model takes this tensor"):
        model.load_weights([("model.qkv.bias", torch.ones(3 * HIDDEN))])


def test_a_reload_puts_rows_in_the_same_places(ranks):
    stored, other = stored_model(), Stored(seed=1)
    for name, p in stored.permutations.items():
        other.add(name, *stored.plain[name].shape, torch.from_numpy(p))
    model, dense = built(stored.config(), Fused), Fused(None)
    record_metadata_for_reloading(model)
    model.load_weights(tensors(stored))
    finished(model)
    initialize_layerwise_reload(model)
    model.load_weights(tensors(other))
    finalize_layerwise_reload(model, None)
    dense.load_weights(tensors(other, dense=True))
    finished(dense)
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(model.model.qkv(x), dense.model.qkv(x), rtol=0, atol=1e-4)


def test_folds_count_rows_as_the_file_does(ranks):
    """The permutation of a fold comes first, then what the model does."""
    stored, producer = stored_model(), Producer(name="model.qkv", rows=(HIDDEN, 2 * HIDDEN))
    fold = Fold(consumer="model.out", producers=[producer], coupling="elementwise")
    model, dense = built(stored.config([fold]), Fused), Fused(None)
    model.load_weights(tensors(stored))
    finished(model)
    rows = torch.arange(3 * HIDDEN)
    rows[HIDDEN : 2 * HIDDEN] = rows[HIDDEN : 2 * HIDDEN][torch.from_numpy(stored.permutations["model.out"]).long()]
    stored.plain["model.qkv"], stored.bias["model.qkv"] = (
        stored.plain["model.qkv"][rows],
        stored.bias["model.qkv"][rows],
    )
    dense.load_weights(tensors(stored, dense=True))
    finished(dense)
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(model.model.qkv(x), dense.model.qkv(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, tensor: tensor[:-1], "does more with it than to rearrange its rows"),
        (lambda name, tensor: tensor.view(3, 5), "does not tell which: RuntimeError: shape"),
    ],
)
def test_a_model_that_does_more_than_that(ranks, change, message):
    class Other(Fused):
        def rearrange(self, name, tensor):
            return change(name, tensor)

    with pytest.raises(RiaError, match=message):
        built(stored_model().config(), Other)

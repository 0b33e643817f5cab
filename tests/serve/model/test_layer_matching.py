"""Each pruned linear of a checkpoint is served by exactly one layer, whatever prefix vLLM's authors gave that layer."""

import pytest
import torch
from gated_model import (
    FOLD,
    HIDDEN,
    INNER,
    Block,
    Model,
    attached,
    expected,
    finished,
    stored_model,
    tensors,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper

from ria_vllm.errors import RiaError
from ria_vllm.serve.linear.method import Sparse24LinearMethod
from ria_vllm.serve.load.load_report import LoadReport
from ria_vllm.serve.model.layer_matching import match_layers


@pytest.fixture
def stored():
    return stored_model()


@pytest.mark.parametrize(
    "prefixes",
    [("wrong.gate_up", "wrong.down"), ("", "layers.0.gate")],
)
def test_layers_are_found_by_their_path(ranks, stored, prefixes):
    """Folds, gathers and biases are right whether the prefix is empty, names another linear, or is the path."""
    config = stored.config([FOLD])
    assert config.folding.folded
    model = attached(config, Model(config, prefixes=prefixes))
    down = model.layers[0].down
    assert down.quant_method.creation.model_loader(down) is None
    model.load_weights(tensors(stored))
    finished(model)
    x = torch.randn(5, HIDDEN)
    want = expected(stored, x)
    assert want.std() > 0.3
    torch.testing.assert_close(model.layers[0](x).double(), want, rtol=0, atol=1e-4)
    assert LoadReport.of(model).kernels.total() == 2


def test_a_pruned_linear_that_no_layer_serves(ranks, stored):
    stored.add("model.layers.1.down", HIDDEN, INNER)
    config = stored.config()
    with pytest.raises(
        RiaError, match=r"would not be served: model\.layers\.1\.down\..*no layer of vLLM's Model takes it"
    ):
        attached(config, Model(config))


def test_a_pruned_linear_of_another_stage_is_served_there(ranks, stored):
    stored.add("model.layers.1.down", HIDDEN, INNER)
    config = stored.config()
    model = Model(config)
    model.layers.append(PPMissingLayer())
    match_layers(config, model)


def test_a_layer_that_takes_dense_weights_only(ranks, stored):
    config = stored.config()
    with pytest.raises(RiaError, match=r"layers\.0\.(down|gate).*vLLM's layer layers\.0\.\w+ takes dense weights only"):
        attached(config, Model(config, quantized=False))


def test_a_linear_that_two_layers_take(ranks, stored):
    config = stored.config()
    model = Model(config)
    model.layers[0].other = Block(config, ("layers.0.down", "layers.0.down")).down
    model.layers[0]._modules["twin"] = model.layers[0].other
    model.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": ""},
        orig_to_new_stacked=dict(Model.hf_to_vllm_mapper.orig_to_new_stacked) | {".down": (".down", [None, None])},
    )
    del model.layers[0].down
    match_layers(config, model)  # by its prefix; both names are one layer
    second = Block(config, ("layers.0.down", "layers.0.down"))
    model.layers[0].second = second.down
    config.served_by.clear()
    with pytest.raises(RiaError, match=r"model\.layers\.0\.down: vLLM's Model has more than one layer for each"):
        match_layers(config, model)


def test_a_dense_layer_that_a_prefix_took_for_a_pruned_one(ranks, stored):
    """Its path shows that it is dense, so it gets vLLM's own method again."""
    config = stored.config()
    config.stored.add("model.extra")
    config.names["model.extra"] = "model.extra"
    model = Model(config)
    model.extra = ReplicatedLinear(HIDDEN, INNER, quant_config=config, prefix="layers.0.down", return_bias=False)
    match_layers(config, model)
    assert type(model.extra.quant_method) is UnquantizedLinearMethod
    assert model.extra.weight.shape == (INNER, HIDDEN) and not hasattr(model.extra, "compressed")
    weight = torch.randn(INNER, HIDDEN)
    model.extra.weight.weight_loader(model.extra.weight, weight)
    assert torch.equal(model.extra.weight, weight)


def test_a_second_model_of_the_same_checkpoint(ranks, stored):
    """The draft of a multi-token prediction is built with the target's config.

    It need not use every linear. Those that the target serves are not the draft's, even if a layer has the same path.
    """

    class Draft(Model):
        pass

    config = stored.config()
    target = attached(config, Model(config))
    draft = Draft(config, prefixes=("mtp.layers.0.gate_up", "mtp.layers.0.down"))
    match_layers(config, draft)
    assert {type(m.quant_method) for m in draft.modules() if isinstance(m, LinearBase)} == {UnquantizedLinearMethod}
    assert isinstance(target.layers[0].down.quant_method, Sparse24LinearMethod)
    match_layers(config, Model(config))  # built anew


def test_a_loader_that_the_model_gave_its_weight_stays(ranks, stored):
    """Mamba-2 brings one, to share groups between ranks."""
    config = stored.config()
    model = Model(config)
    called = []

    def loader(param, loaded_weight):
        called.append(tuple(loaded_weight.shape))
        param.data.copy_(loaded_weight)

    model.layers[0].down.weight.weight_loader = loader
    attached(config, model)
    model.load_weights(tensors(stored))
    assert called == [(HIDDEN, INNER // 2), (HIDDEN, INNER // 8)]

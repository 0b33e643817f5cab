"""When the plugin sees a model that vLLM builds."""

from types import SimpleNamespace

import pytest
import torch
from gated_model import HIDDEN, Model, finished, stored_model
from gated_model import tensors as tensors_of
from test_marlin24 import tensors
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear

from ria_vllm.compressed_tensors.packed_forms import Marlin24, Translation
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import INTEGERS
from ria_vllm.serve import plugin
from ria_vllm.serve.load.layerwise import watch_reloads
from ria_vllm.serve.load.stream import Hooks, WeightStream
from ria_vllm.serve.model import layer_matching, reload


def test_models_inside_a_model_wait_for_the_outermost(ranks, monkeypatch):
    """vLLM builds them by the same function; only the outermost has the paths that the checkpoint knows."""
    from vllm.model_executor.model_loader import utils

    matched = []
    monkeypatch.setattr(layer_matching, "match_layers", lambda config, model: matched.append(type(model)))
    monkeypatch.setattr(utils, "record_metadata_for_reloading", lambda model: None)
    plugin.watch_models()
    config = get_current_vllm_config()
    monkeypatch.setattr(config, "quant_config", stored_model().config())

    class Inner(Model):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__(vllm_config.quant_config)

    class Outer(Inner):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__(vllm_config=vllm_config)
            self.inner = utils.initialize_model(vllm_config, model_class=Inner, model_config=vllm_config.model_config)
            assert matched == []

    class Failing(Inner):
        def __init__(self, *, vllm_config, prefix=""):
            utils.initialize_model(vllm_config, model_class=Inner, model_config=vllm_config.model_config)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        utils.initialize_model(config, model_class=Failing, model_config=config.model_config)
    utils.initialize_model(config, model_class=Outer, model_config=config.model_config)
    assert matched == [Outer]


class WithDense(Model):
    """A model with a layer that stays dense."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config.quant_config)
        self.fc = ReplicatedLinear(16, 8, bias=False, quant_config=vllm_config.quant_config, prefix="fc")


@pytest.fixture
def built(ranks, monkeypatch):
    """(what vLLM builds as the plugin sees it, what its checkpoint holds); call the first with the model's folder."""
    from vllm.model_executor.model_loader import utils
    from vllm.model_executor.model_loader.reload import layerwise

    for module, name in (
        (utils, "record_metadata_for_reloading"),
        (layerwise, "finalize_layerwise_processing"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(reload, "check_reload", lambda *_, **__: None)
    monkeypatch.setattr(reload, "proofs_of", lambda config, *_: (config.schema, {}))
    plugin.watch_models()
    watch_reloads()
    config, stored = get_current_vllm_config(), stored_model()
    monkeypatch.setattr(config, "quant_config", stored.config())
    config.quant_config.where = "the target"
    config.quant_config.stored.add("fc")

    def build(folder):
        own = folder and SimpleNamespace(model=folder)
        return utils.initialize_model(config, model_class=WithDense, model_config=own)

    return build, stored


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_reload_that_leaves_a_dense_layer_out(built, load_format):
    """Also the first load after a start with dummy weights. vLLM would keep what the layer had, and only warn."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    build, stored = built
    get_current_vllm_config().load_config.load_format = load_format
    dense = [("fc.weight", torch.ones(8, 16))]
    model = build("the folder")
    if load_format == "auto":
        model.load_weights(iter([*tensors_of(stored), *dense]))
    finished(model)

    def files(tensors):
        loader = DefaultModelLoader(LoadConfig())
        loader._get_weights_iterator = lambda source: iter(tensors)
        return loader.get_all_weights(SimpleNamespace(model="the folder", revision=None), model)

    def reload(*weights):
        initialize_layerwise_reload(model)
        for part in weights:
            model.load_weights(part)
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))

    reload(files([*tensors_of(stored), *dense]))
    x = torch.randn(3, HIDDEN)
    before = model.layers[0](x)
    others = [(name, one * 2 if name.endswith("compressed") else one) for name, one in tensors_of(stored)]
    with pytest.raises(RiaError, match="vLLM's layer fc did not get all of its weights in this reload"):
        reload(files(others))
    assert torch.equal(model.layers[0](x), before)
    reload(files([*others, *dense]))
    assert not torch.equal(model.layers[0](x), before)
    reload(files([*tensors_of(stored), *dense]))
    reload()  # an update of nothing
    reload(list(tensors_of(stored)))  # somebody sends what has changed
    reload(one for one in tensors_of(stored))
    reload(files([*tensors_of(stored), *dense]))


def test_pieces_of_an_update_that_ended_do_not_go_into_the_next(engine, monkeypatch):
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        layerwise,
    )

    monkeypatch.setattr(layerwise, "finalize_layerwise_processing", layerwise.finalize_layerwise_processing)
    watch_reloads()
    form, loaded = Marlin24(INTEGERS[4, 128]), []
    model = torch.nn.Linear(4, 4)
    model.load_weights = lambda weights: loaded.extend(name for name, _ in weights)
    translation = Translation(lambda name: form, lambda name: form.format)
    WeightStream(model, Hooks(translation=translation))
    layerwise.record_metadata_for_reloading(model)

    def update(*pieces):
        initialize_layerwise_reload(model)
        for piece in pieces:
            model.load_weights([(f"fc.{piece}", tensors()[piece])])
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))

    with pytest.raises(RiaError, match=r"fc\.scale_packed is in none of the weight files"):
        update("weight_packed")
    with pytest.raises(RiaError, match=r"fc\.weight_packed is in none of the weight files"):
        update("scale_packed", "meta")
    assert not loaded
    update("scale_packed", "weight_packed", "meta")
    assert len(loaded) == 3

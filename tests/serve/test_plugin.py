"""When the plugin sees a model that vLLM builds."""

from types import SimpleNamespace

import pytest
import torch
from gated_model import Model, stored_model
from test_marlin24 import tensors
from vllm.config import get_current_vllm_config

from ria_vllm.compressed_tensors.packed_forms import Marlin24, Translation
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import INTEGERS
from ria_vllm.format.schema import RiaSchema, SparsityConfig
from ria_vllm.serve import plugin
from ria_vllm.serve.model import layer_matching
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.reload.watching import holders, watch_reloads
from ria_vllm.serve.served_model import ServedModel


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


def test_pieces_of_an_update_that_ended_do_not_go_into_the_next(engine, monkeypatch):
    from vllm.model_executor.model_loader.reload import layerwise

    for name in ("finalize_layerwise_processing", "_layerwise_process"):
        monkeypatch.setattr(layerwise, name, getattr(layerwise, name))
    begin = layerwise.initialize_layerwise_reload
    for module in holders(begin):
        monkeypatch.setattr(module, begin.__name__, begin)
    watch_reloads()
    form, loaded = Marlin24(INTEGERS[4, 128]), []
    model = torch.nn.Linear(4, 4)
    model.load_weights = lambda weights: loaded.extend(name for name, _ in weights)
    translation = Translation(lambda name: form, lambda name: form.format)
    config = RiaConfig(RiaSchema(sparsity_config=SparsityConfig()))
    config.translation = translation
    ServedModel(config, model, None)
    layerwise.record_metadata_for_reloading(model)

    def update(*pieces):
        layerwise.initialize_layerwise_reload(model)
        for piece in pieces:
            model.load_weights([(f"fc.{piece}", tensors()[piece])])
        layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))

    with pytest.raises(RiaError, match=r"fc\.scale_packed is in none of the weight files"):
        update("weight_packed")
    with pytest.raises(RiaError, match=r"fc\.weight_packed is in none of the weight files"):
        update("scale_packed", "meta")
    assert not loaded
    update("scale_packed", "weight_packed", "meta")
    assert len(loaded) == 3

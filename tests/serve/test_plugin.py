"""When the plugin sees a model that vLLM builds."""

import pytest
from gated_model import Model, stored_model
from vllm.config import get_current_vllm_config

from ria_vllm.serve import plugin
from ria_vllm.serve.model import layer_matching


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

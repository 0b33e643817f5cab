"""Drafts of speculative decoding beside a target that takes LoRA adapters: they take none themselves."""

import copy as copies
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from checkpoint_folder import Collecting, config_of, files
from gated_model import PREFIX, Model, stored_model
from mixture_layers import Model as Mixture
from mixture_layers import StoredMixture
from vllm.config import LoRAConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.serve import plugin
from ria_vllm.serve.experts.method import Sparse24MoEMethod
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.model import layer_matching

TARGET = SimpleNamespace(model="the target", revision=None, dtype=torch.float32)
DRAFT = SimpleNamespace(model="the draft", revision=None, dtype=torch.float32)


@pytest.fixture
def vllm_config(ranks):
    """An engine's, which serves adapters."""
    current = get_current_vllm_config()
    current.lora_config, current.model_config = LoRAConfig(max_lora_rank=8), TARGET
    current.speculative_config = SimpleNamespace(draft_model_config=DRAFT, target_model_config=TARGET)
    return current


def build(vllm_config, model_class, model_config):
    from vllm.model_executor.model_loader import utils

    return utils.initialize_model(vllm_config, model_class=model_class, model_config=model_config)


class Asking:
    """What a model is told while it is built, and a part of it, which vLLM builds under a copy of the configuration."""

    def __init__(self, *, vllm_config, prefix=""):
        self.lora = [EngineOptions.current().lora]
        if prefix != "part":
            part = copies.copy(vllm_config)
            part.model_config = copies.copy(vllm_config.model_config)
            from vllm.model_executor.model_loader import utils

            self.lora += utils.initialize_model(part, model_class=Asking, prefix="part").lora


@pytest.fixture
def unrecorded(monkeypatch):
    from vllm.model_executor.model_loader import utils

    monkeypatch.setattr(utils, "record_metadata_for_reloading", lambda model: None)


def test_who_takes_adapters(vllm_config, unrecorded):
    assert build(vllm_config, Asking, None).lora == [True, True]
    assert build(vllm_config, Asking, TARGET).lora == [True, True]
    assert build(vllm_config, Asking, DRAFT).lora == [False, False]  # EAGLE and MTP: the target's configuration
    of_draft = copies.copy(vllm_config)
    of_draft.model_config = DRAFT
    assert build(of_draft, Asking, None).lora == [False, False]  # the method draft_model
    assert build(of_draft, Asking, DRAFT).lora == [False, False]
    assert EngineOptions.current().lora


class Gated(Model):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config.quant_config)


def test_a_smoothed_draft_is_served_and_folded(vllm_config, unrecorded):
    def folded(model_config):
        producers = [Producer(name=f"{PREFIX}.{name}") for name in ("gate", "up")]
        rule = Fold(consumer=f"{PREFIX}.down", producers=producers, coupling="elementwise")
        config = stored_model().config([rule])
        config.schema.recipe |= {"smooth": 0.5} if model_config is DRAFT else {}
        vllm_config.quant_config = config
        modules = build(vllm_config, Gated, model_config).modules()
        linears = [one for m in modules if isinstance(m, LinearBase) for one in m.quant_method.linears]
        return {one.name.rpartition(".")[2] for one in linears if one.folded}

    plugin.watch_models()
    assert folded(DRAFT) == {"down"}
    assert folded(TARGET) == set()


def test_a_draft_with_pruned_experts(vllm_config, unrecorded):
    class Experts(Mixture):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__(StoredMixture().config())

    draft = build(vllm_config, Experts, DRAFT)
    assert isinstance(draft.experts.quant_method, Sparse24MoEMethod)
    with pytest.raises(RiaError, match="LoRA adapters on the experts"):
        build(vllm_config, Experts, TARGET)


def test_the_first_load_of_a_draft_asks_for_no_adapters(vllm_config, unrecorded, monkeypatch, tmp_path):
    """Nothing tells this folder from another one with other scales, which matters to adapters only."""
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path, permuted=False)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["recipe"]["smooth"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(layer_matching, "match_layers", lambda *_: None)
    plugin.watch_models()
    for draft in (True, False):
        own = SimpleNamespace(model=str(tmp_path), revision=None)
        vllm_config.quant_config = config_of(tmp_path)
        vllm_config.speculative_config.draft_model_config = own if draft else DRAFT
        model = build(vllm_config, Collecting, own)
        if draft:
            model.load_weights(files(model, tmp_path))
            assert model.loaded
        else:
            with pytest.raises(RiaError, match="scaled or rotated"):
                model.load_weights(files(model, tmp_path))

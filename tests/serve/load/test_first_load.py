"""Without proofs, the files of the first load must be those whose permutations the server holds, read long before."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from checkpoint_folder import config_of
from vllm.config import LoadConfig, get_current_vllm_config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.serve.model import layer_matching
from ria_vllm.serve.served_model import ServedModel


class Collecting(torch.nn.Module):
    """Stands in for a model, and keeps the names of what it loads."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def load_weights(self, weights):
        self.loaded += [name for name, _ in weights]


def replace(folder):
    """What `compress --overwrite` leaves: another run's folder, consistent in itself."""
    torch.manual_seed(9)
    tiny.write(tiny.FAMILIES["llama-gqa"], folder, seed=1)


def model_config(folder):
    of_layers = {"runner_type": "generate", "head_dtype": None, "dtype": None, "hf_config": None}
    return SimpleNamespace(model=str(folder), revision=None, **of_layers)


@pytest.fixture
def build(engine, monkeypatch):
    """Call with a folder, and perhaps others that vLLM names: the model that serves it, without layers."""
    monkeypatch.setenv(proofs.VARIABLE, "0")
    monkeypatch.setattr(layer_matching, "match_layers", lambda *_: None)

    def build(folder, own=None, of_engine=None):
        get_current_vllm_config().model_config = None if of_engine is None else model_config(of_engine)
        model = Collecting()
        ServedModel(config_of(folder), model, model_config(own or folder))
        return model

    return build


def load(model, folder):
    """As vLLM does it, lazily."""
    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    model.load_weights(loader.get_all_weights(model_config(folder), model))


def test_a_folder_that_was_replaced_before_the_first_load(build, copy):
    model = build(copy)
    replace(copy)
    with pytest.raises(RiaError, match=f"^{copy}/?: these files have been replaced"):
        load(model, copy)
    assert not model.loaded


def test_a_draft_that_is_built_with_the_configuration_of_its_target(build, checkpoint, copy):
    """Its files are its own, and their permutations not those of the target."""
    replace(copy)
    model = build(checkpoint, own=copy)
    load(model, copy)
    assert model.loaded


def test_what_is_not_proved_is_said(build, checkpoint, copy, monkeypatch, caplog):
    monkeypatch.delenv(proofs.VARIABLE)
    build(checkpoint, own=copy).process_weights_after_loading()
    assert f"{copy}: its layers are not proved" in caplog.text


def test_a_draft_is_compared_with_its_own_files(build, checkpoint, copy):
    """The engine's model is its target."""
    replace(copy)
    model = build(copy, of_engine=checkpoint)
    load(model, copy)
    assert model.loaded

"""The files of the first load must still be those whose permutations the server holds, which it read long before."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from checkpoint_folder import Collecting, config_of, files

from ria_vllm.errors import RiaError

OTHER_ORDERS = "other channel orders than those that this server has folded. Start a server"


def replace(folder):
    """What `compress --overwrite` leaves: another run's folder, consistent in itself."""
    torch.manual_seed(9)
    tiny.write(tiny.FAMILIES["llama-gqa"], folder, seed=1)


@pytest.fixture
def build(watched, monkeypatch):
    """Call with a folder and perhaps the model's own one: the model, as vLLM builds it and our plugin sees it."""
    from vllm.model_executor.model_loader import utils

    def build(folder, own=None):
        monkeypatch.setattr(watched, "quant_config", config_of(folder))
        model_config = SimpleNamespace(model=str(own or folder), revision=None)
        return utils.initialize_model(watched, model_class=Collecting, model_config=model_config)

    return build


def test_a_folder_that_was_replaced_before_the_first_load(build, copy):
    model = build(copy)
    replace(copy)
    with pytest.raises(RiaError, match=f"^{copy}/?: its weights are stored in {OTHER_ORDERS}"):
        model.load_weights(files(model, copy))
    assert not model.loaded


def test_a_folder_that_is_replaced_while_it_is_loaded(build, copy):
    """vLLM opens one file after the other, and downloads them from the hub only now."""
    model = build(copy)
    model.meanwhile = lambda: replace(copy)
    with pytest.raises(RiaError, match=OTHER_ORDERS):
        model.load_weights(files(model, copy))
    assert model.loaded


def test_a_first_load_of_what_somebody_sends(build, copy):
    """It comes from no file, by its names, as in a reload."""
    model = build(copy)
    replace(copy)
    model.load_weights([("lm_head.weight", torch.zeros(2))])
    assert model.loaded == ["lm_head.weight"]


def test_a_draft_that_is_built_with_the_configuration_of_its_target(build, checkpoint, copy):
    """Its files are its own, and their orders not those of the target."""
    replace(copy)
    model = build(checkpoint, own=copy)
    model.load_weights(files(model, copy))
    assert model.loaded

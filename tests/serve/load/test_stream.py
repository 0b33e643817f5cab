"""The stream of tensors: what is refused before a model sees it."""

import pytest
import torch
from gated_model import HIDDEN, INNER, PREFIX, Model, attached, expected, finished, stored_model, tensors
from vllm.model_executor.model_loader.reload import (
    initialize_layerwise_reload,
    layerwise,
    record_metadata_for_reloading,
)

from ria_vllm.errors import RiaError
from ria_vllm.serve.model import reload
from ria_vllm.serve.reload.watching import holders, watch_reloads


@pytest.fixture
def stored():
    return stored_model()


def test_a_reload_is_checked_before_any_tensor_is_loaded(ranks, stored, monkeypatch):
    for name in ("_layerwise_process", "finalize_layerwise_processing"):
        monkeypatch.setattr(layerwise, name, getattr(layerwise, name))
    begin = layerwise.initialize_layerwise_reload
    for module in holders(begin):
        monkeypatch.setattr(module, begin.__name__, begin)
    watch_reloads()
    config, checked = stored.config(), []

    def check(_, built_with, from_files):
        checked.append(from_files)
        if from_files:
            raise RiaError("other permutations")

    monkeypatch.setattr(reload, "check_reload", check)
    model = attached(config, Model(config))
    model.load_weights(tensors(stored))
    assert not checked
    finished(model)
    x = torch.randn(3, HIDDEN)
    before = model.layers[0](x)
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    with pytest.raises(RiaError, match="other permutations"):
        model.load_weights(tensors(stored))
    assert torch.equal(model.layers[0](x), before)  # the server keeps the weights that it has
    checked.clear()
    initialize_layerwise_reload(model)
    model.load_weights([])  # from a trainer, not from files
    assert checked == [False]


def test_a_tensor_of_two_files_is_refused(ranks, stored):
    """Some of vLLM's ways to load take files that the index does not name, and the last tensor would count."""
    config = stored.config()
    model = attached(config, Model(config))
    name = "model.layers.0.up.compressed"
    twice = ((n, t) for pair in tensors(stored) for n, t in ([pair] if pair[0] != name else [pair, pair]))
    with pytest.raises(RiaError, match=f"{name} is in two of the weight files"):
        model.load_weights(twice)


def test_what_only_describes_a_pruned_linear_is_dropped(ranks, stored):
    """The model would not know it. Of a dense layer, it goes to the model."""
    config = stored.config()
    model = attached(config, Model(config))
    for part in ("input_scale", "input_zero_point", "input_permutation"):
        model.load_weights([(f"{PREFIX}.{linear}.{part}", torch.ones(1)) for linear in ("gate", "down")])
        with pytest.raises(ValueError, match="no module or parameter named"):
            model.load_weights([(f"model.layers.0.norm.{part}", torch.ones(1))])


@pytest.mark.parametrize("name", ["up.k_scale", "attn.v_scale", "attn.k_cache.scale"])
def test_scales_of_the_cache_are_refused(ranks, stored, name):
    """vLLM drops them with a warning, and attention would go on with scales of 1."""
    config = stored.config()
    model = attached(config, Model(config))
    with pytest.raises(RiaError, match=f"layers.0.{name}: .*Leave them out"):
        model.load_weights([*tensors(stored), (f"model.layers.0.{name}", torch.ones(()))])


class Skipping(Model):
    """Drops what it has no parameter for, as vLLM's MiMo-V2 and Bailing do."""

    def load_weights(self, weights):
        def is_known(name):
            names = {name, name.replace(".gate.", ".gate_up."), name.replace(".up.", ".gate_up.")}
            return names & {f"model.{parameter}" for parameter, _ in self.named_parameters()}

        return super().load_weights((name, tensor) for name, tensor in weights if is_known(name))


@pytest.mark.parametrize("reload", (False, True))
def test_dense_weights_for_pruned_linears_are_refused(ranks, stored, reload):
    """Trainers have dense weights. A server must not go on with its old ones where others are new."""
    config = stored.config()
    model = attached(config, Skipping(config))
    model.load_weights(tensors(stored))
    finished(model)
    record_metadata_for_reloading(model)
    dense = [(f"{PREFIX}.down.weight", torch.zeros(HIDDEN, INNER)), (f"{PREFIX}.down.bias", torch.zeros(HIDDEN))]
    if reload:
        initialize_layerwise_reload(model)
    with pytest.raises(RiaError, match=r"down\.weight: this server has the linear stored as compressed, bitmask"):
        model.load_weights(dense)


def test_weights_that_arrive_outside_a_reload_are_refused(ranks, stored):
    """vLLM's older way to take a trainer's weights: the model's parameters are those of its kernels by then."""
    config = stored.config()
    model = attached(config, Skipping(config))
    model.load_weights(tensors(stored))
    finished(model).process_weights_after_loading()
    for name, tensor in tensors(stored):
        with pytest.raises(RiaError, match="weights arrive outside of a reload"):
            model.load_weights([(name, tensor)])
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(model.layers[0](x).double(), expected(stored, x), atol=1e-4, rtol=1e-4)

"""The stream of tensors: what is refused before a model sees it."""

import pytest
import torch
from gated_model import HIDDEN, PREFIX, Model, attached, expected, finished, stored_model, tensors

from ria_vllm.errors import RiaError


@pytest.fixture
def stored():
    return stored_model()


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
    names = ("input_scale", "input_zero_point", "input_permutation")
    described = [(f"{PREFIX}.{linear}.{part}", torch.ones(1)) for linear in ("gate", "down") for part in names]
    model.load_weights([*tensors(stored), *described])
    for part in names:
        with pytest.raises(ValueError, match="no module or parameter named"):
            model.load_weights([*tensors(stored), (f"model.layers.0.norm.{part}", torch.ones(1))])


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


def test_weights_that_arrive_after_the_model_was_loaded_are_refused(ranks, stored):
    """The model's parameters are those of its kernels by then."""
    config = stored.config()
    model = attached(config, Skipping(config))
    model.load_weights(tensors(stored))
    finished(model).process_weights_after_loading()
    for name, tensor in tensors(stored):
        with pytest.raises(RiaError, match="weights arrive after the model was loaded.*start a server on that folder"):
            model.load_weights([(name, tensor)])
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(model.layers[0](x).double(), expected(stored, x), atol=1e-4, rtol=1e-4)

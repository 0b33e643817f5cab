"""Sublayers run by themselves, against whole layers and against forward hooks."""

import pytest
import torch
from transformers import AutoConfig

from ria_vllm.offline.calibration.embed import embed
from ria_vllm.offline.calibration.sublayer import SublayerRunner
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "opt", "opt-postnorm", "gpt-neox")
TOKENS = torch.arange(2, 62).view(2, 30)


@pytest.fixture(params=FAMILIES)
def runners(request, tiny):
    """The first layer's sublayers, the stream into it, and its call."""
    folder = tiny(request.param)
    model = StreamedModel(folder, AutoConfig.from_pretrained(folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        embedded = embed(model, Recipe(reconstruct="none"), TOKENS, None, Ranks(), Monitor(shown=False))
        layer, stream = model.load_layer(0), embedded.streams.pruned[0]
        runners = [SublayerRunner(layer, one, torch.float32) for one in embedded.topologies.of(0).sublayers]
        yield runners, stream, embedded.arguments.of(0).call(stream)


def test_sublayers_in_sequence_equal_the_layer(runners):
    runners, stream, call = runners
    layer = runners[0].layer
    expected, result = call(layer, stream), stream
    for runner in runners:
        before, result = result, runner.run(result, call)
        assert result.shape == before.shape and not torch.equal(result, before)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(call(layer, stream), expected)  # the layer is unchanged


def test_inputs_of_linears_are_those_of_the_whole_layer(runners):
    runners, stream, call = runners
    layer, seen, hooks = runners[0].layer, {}, []
    for name in (name for runner in runners for name in runner.sublayer.linears):
        hook = lambda _, args, name=name: seen.__setitem__(name, args[0])  # noqa: E731
        hooks.append(layer.get_submodule(name).register_forward_pre_hook(hook))
    call(layer, stream)
    for hook in hooks:
        hook.remove()
    for runner in runners:
        for group in (group for stage in runner.sublayer.stages for group in stage):
            first = group.linears[0]
            after, inputs = runner.watch(stream, call, [first])
            assert after is None and list(inputs) == [first]  # it stopped there
            torch.testing.assert_close(inputs[first], seen[first], rtol=1e-4, atol=1e-4)
        after, inputs = runner.watch(stream, call, runner.sublayer.linears, to_the_end=True)
        assert set(inputs) == set(runner.sublayer.linears)
        stream = runner.run(stream, call)
        assert torch.equal(after, stream)

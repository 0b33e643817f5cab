"""What layers leave for later ones, against what transformers' own forward pass does, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decoders import layers_of, small
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.embedding import Embedder
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.run.sharing import find_sharing, with_what_is_left

SHARED = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 258, "sliding_window": 16,
}  # fmt: skip
ALTUP = {"intermediate_size": [96] * 6, "laurel_rank": 16, "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4}
MODELS = {"gemma4_text": SHARED, "gemma3n_text": SHARED | ALTUP}
TOKENS = torch.arange(2, 42)[None]


class Calls(Embedder):
    """How an in-memory model calls its layers."""

    def __init__(self, model: nn.Module):
        self.model = SimpleNamespace(
            folder=Path("toy"), model=model, layers=layers_of(model), layer_prefix="layers.{}.".format,
            device=torch.device("cpu"), load_layer=layers_of(model).__getitem__, free_layer=lambda index: None,
        )  # fmt: skip
        self.base, self.unusable, self.tupled = model.model, "toy", 0


@pytest.fixture(params=MODELS)
def model(request):
    return small(request.param, **MODELS[request.param])


@pytest.fixture
def calls(model):
    embedder = Calls(model)
    embedder.learn_varying(TOKENS, TOKENS.flip(1))
    return embedder(TOKENS)


def test_the_last_layers_of_each_kind_leave_keys_and_values(model, calls):
    stream, calls = calls
    sharing = find_sharing(layers_of(model), calls, stream)
    sliding, full = (0, "sliding_attention"), (0, "full_attention")
    if model.config.model_type == "gemma3n_text":
        sliding, full = (0, 2), (0, 3)
    assert [sharing.kept(index) for index in range(6)] == [[], [], [sliding], [full], [], []]
    assert [set(sharing.before(index)) for index in range(6)] == [set(), set(), set(), set(), {sliding}, {full}]
    assert [sharing.done(index) for index in range(6)] == [*[set()] * 4, {sliding}, {sliding, full}]
    key, value = sharing.before(4)[sliding]
    assert key.shape == value.shape == (1, 2, 40, 16) and key.is_meta


def test_the_layers_alone_compute_what_the_model_does(model, calls):
    (stream, calls), left, seen = calls, {}, []
    sharing = find_sharing(layers_of(model), calls, stream)
    hooks = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers_of(model)]
    model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, (layer, call, expected) in enumerate(zip(layers_of(model), calls, seen, strict=True)):
        found = {}
        stream = call.with_left({entry: left[entry] for entry in sharing.before(index)})(layer, stream, found)
        left |= {entry: found[entry] for entry in sharing.kept(index)}
        torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)
    assert len(left) == 2


def test_inputs_made_from_the_text_are_told_from_the_others(model):
    embedder = Calls(model)
    embedder.learn_varying(TOKENS, TOKENS.flip(1))
    assert embedder.varying == {0 if model.config.model_type == "gemma4_text" else 1}
    _, (call, *_) = embedder(TOKENS)
    assert [call[slot].shape for slot in call.varying] == [(1, 40, 16)]


class Adding(nn.Module):
    """A layer that adds what it gets beside the stream, if that is a tensor."""

    def __init__(self, returned=None):
        super().__init__()
        self.linear, self.returned = nn.Linear(8, 8), returned

    def forward(self, stream, beside):
        out = self.linear(stream)
        out = out + beside if isinstance(beside, torch.Tensor) else out
        return out if self.returned is None else (out, self.returned(stream))


class Chain(nn.Module):
    """A model that passes its layers what `between` makes of the embedding, the stream and what the layer before it has
    returned beside it."""

    def __init__(self, layers, between):
        super().__init__()
        self.embed = nn.Embedding(258, 8)
        self.layers = nn.ModuleList(layers)
        self.between = between

    def forward(self, input_ids, use_cache=False):
        first, out = self.embed(input_ids), None
        stream = first
        for layer in self.layers:
            beside = out[1] if isinstance(out, tuple) else None
            out = layer(stream, beside=self.between(first, stream, beside))
            stream = out[0] if isinstance(out, tuple) else out
        return stream


class ChainCalls(Calls):
    """How a `Chain` calls its layers."""

    def __init__(self, between, **settings):
        torch.manual_seed(0)
        model = Chain([Adding(**settings) for _ in range(3)], between)
        self.model = SimpleNamespace(
            folder=Path("toy"), model=model, layers=model.layers, layer_prefix="layers.{}.".format,
            device=torch.device("cpu"), load_layer=model.layers.__getitem__, free_layer=lambda index: None,
        )  # fmt: skip
        self.base, self.unusable = model, "toy"

    def learn(self):
        with torch.no_grad():
            self.learn_form(TOKENS)
            self.learn_varying(TOKENS, TOKENS.flip(1))


REFUSED = r"toy: layers\.1: Chain makes its argument beside of this layer from what earl"


def test_an_input_made_from_earlier_layers_is_refused():
    ChainCalls(lambda first, stream, beside: first * 2).learn()
    with pytest.raises(RiaError, match=REFUSED):
        ChainCalls(lambda first, stream, beside: stream * 2).learn()
    with pytest.raises(RiaError, match=r"toy: layers\.0: Chain passes its layers its argument beside that differs"):
        ChainCalls(lambda first, stream, beside: [first]).learn()


def test_what_layers_return_besides_the_stream_must_reach_no_other_layer():
    read = ChainCalls(lambda first, stream, beside: beside, returned=lambda stream: 2 * stream)
    with pytest.raises(RiaError, match=REFUSED):
        read.learn()
    unread = ChainCalls(lambda first, stream, beside: None, returned=lambda stream: 2 * stream)
    unread.learn()
    assert not unread.varying and [call["beside"] for call in unread(TOKENS)[1]] == [None] * 3


class Writer(nn.Module):
    """Reads what the layer before it has put into a mapping, in one way or another."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, stream, kept):
        for (found,) in self.read(kept):
            stream = stream + found
        kept["it"] = (stream + 1,)
        return stream


READS = {
    "an item": lambda kept: [kept["it"]] if len(kept) else [],
    "get": lambda kept: [kept.get("it")] if len(kept) else [],
    "all items": lambda kept: [value for _, value in kept.items()],
    "a union": lambda kept: list(dict(kept | {}).values()),
    "removed": lambda kept: [kept.pop("it")] if len(kept) else [],
}


@pytest.mark.parametrize("read", READS)
def test_every_way_to_read_a_mapping_counts(read):
    layers = [Writer(READS[read]) for _ in range(3)]
    calls = [LayerCall(({},), {}, False, "toy", mappings={0: 4}) for _ in layers]
    sharing = find_sharing(layers, calls, torch.zeros(1, 5, 8))
    assert [sharing.kept(index) for index in range(3)] == [[(4, "it")], [(4, "it")], []]
    assert [set(sharing.before(index)) for index in range(3)] == [set(), {(4, "it")}, {(4, "it")}]
    stream, (first, second, _) = with_what_is_left(layers, torch.zeros(1, 5, 8), calls)
    assert torch.equal(first(layers[0], stream), stream) and len(first[0]) == 0
    assert float(second(layers[1], stream).std()) > 0.5  # random

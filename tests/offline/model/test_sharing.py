"""What layers leave for later ones, against what transformers' own forward pass does, and what is refused."""

from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decoders import layers_of, small
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.embedding import Embedder
from ria_vllm.offline.model.layer_call import LayerCall
from ria_vllm.offline.model.sharing import find_sharing, with_what_is_left

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
            device=torch.device("cpu"),
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


def test_without_readers_nothing_is_kept():
    model = small("gemma4_text")
    stream, calls = Calls(model)(TOKENS)
    assert calls[0].mappings
    sharing = find_sharing(layers_of(model), calls, stream)
    assert sharing.left == ({}, {}) and sharing.done(1) == set()
    stream, calls = Calls(small("llama"))(TOKENS)
    assert not calls[0].mappings


def test_inputs_made_from_the_text_are_told_from_the_others(model):
    embedder = Calls(model)
    embedder.learn_varying(TOKENS, TOKENS.flip(1))
    assert embedder.varying == {0 if model.config.model_type == "gemma4_text" else 1}
    _, (call, *_) = embedder(TOKENS)
    assert [call[slot].shape for slot in call.varying] == [(1, 40, 16)]


class Chain(nn.Module):
    """A model that passes its layers what `between` makes of the embedding and of the stream."""

    def __init__(self, between):
        super().__init__()
        self.embed = nn.Embedding(258, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.between = between

    def forward(self, input_ids, use_cache=False):
        first = stream = self.embed(input_ids)
        for layer in self.layers:
            stream = layer(stream, beside=self.between(first, stream))
        return stream


def chain(between) -> Calls:
    model = Chain(between)
    embedder = Calls.__new__(Calls)
    embedder.model = SimpleNamespace(
        folder=Path("toy"), model=model, layers=model.layers, layer_prefix="layers.{}.".format,
        device=torch.device("cpu"),
    )  # fmt: skip
    embedder.base, embedder.unusable, embedder.tupled = model, "toy", 0
    return embedder


@torch.no_grad()
def test_an_input_made_from_earlier_layers_is_refused():
    chain(lambda first, stream: first * 2).learn_varying(TOKENS, TOKENS.flip(1))
    with pytest.raises(RiaError, match=r"toy: layers\.1: Chain makes its argument beside of this layer from what earl"):
        chain(lambda first, stream: stream * 2).learn_varying(TOKENS, TOKENS.flip(1))
    with pytest.raises(RiaError, match=r"toy: layers\.0: Chain passes its layers its argument beside that differs"):
        chain(lambda first, stream: [first]).learn_varying(TOKENS, TOKENS.flip(1))


class Passing(nn.Module):
    """A model that passes each layer what the one before it has returned beside the stream."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(258, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, input_ids, use_cache=False):
        stream, beside = self.embed(input_ids), None
        for layer in self.layers:
            stream, beside = layer(stream, beside=beside)
        return stream


@torch.no_grad()
def test_what_layers_return_besides_the_stream_must_go_nowhere():
    embedder = chain(None)
    embedder.base = embedder.model.model = model = Passing()
    embedder.model.layers, embedder.tupled = model.layers, 2
    with pytest.raises(
        RiaError, match=r"toy: layers\.1: Passing makes its argument beside of this layer from what earl"
    ):
        embedder.learn_varying(TOKENS, TOKENS.flip(1))


class Writer(nn.Module):
    """Reads what the layer before it has put into a mapping, in one way or another."""

    def __init__(self, read, value=lambda stream: (stream + 1,)):
        super().__init__()
        self.read, self.value = read, value

    def forward(self, stream, kept):
        for (found,) in self.read(kept):
            stream = stream + found
        kept["it"] = self.value(stream)
        return stream


READS = {
    "an item": lambda kept: [kept["it"]] if len(kept) else [],
    "get": lambda kept: [kept.get("it")] if len(kept) else [],
    "all values": lambda kept: list(kept.values()),
    "all items": lambda kept: [value for _, value in kept.items()],
    "each key": lambda kept: [kept[key] for key in kept],
}


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("read", READS)
def test_every_way_to_read_a_mapping_counts(read, kind):
    layers = [Writer(READS[read]) for _ in range(3)]
    calls = [LayerCall((kind(),), {}, False, "toy", mappings={0: 4}) for _ in layers]
    sharing = find_sharing(layers, calls, torch.zeros(1, 5, 8))
    assert [sharing.kept(index) for index in range(3)] == [[(4, "it")], [(4, "it")], []]
    assert [set(sharing.before(index)) for index in range(3)] == [set(), {(4, "it")}, {(4, "it")}]
    stream, (first, second, _) = with_what_is_left(layers, torch.zeros(1, 5, 8), calls)
    assert torch.equal(first(layers[0], stream), stream) and len(first[0]) == 0
    assert float(second(layers[1], stream).std()) > 0.5  # random


def test_mappings_of_their_own_share_nothing():
    layers = [Writer(READS["get"]) for _ in range(2)]
    calls = [LayerCall(({},), {}, False, "toy", mappings={0: number}) for number in range(2)]
    assert find_sharing(layers, calls, torch.zeros(1, 5, 8)).left == ({}, {})


def test_something_else_than_tensors_is_refused():
    layers = [
        Writer(lambda kept: [(kept["it"].pop(),)] if len(kept) else [], lambda stream: {stream}),
        Writer(READS["an item"]),
    ]
    calls = [LayerCall(({},), {}, False, "toy: layers.0", mappings={0: 0})] * 2
    with pytest.raises(RiaError, match="toy: layers.0: leaves a set for later layers"):
        find_sharing([layers[0], layers[0]], calls, torch.zeros(1, 5, 8))

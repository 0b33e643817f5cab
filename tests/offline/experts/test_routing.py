"""Which tokens an expert's statistics are taken from."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.experts.routing import Reads, RoutedTokens, read_by
from ria_vllm.progress import Monitor

# Three chunks; 4 experts; expert 3 is chosen once, and 9 means no expert.
SIZES = (40, 40, 20)


def reads() -> Reads:
    draw, made = torch.Generator().manual_seed(0), Reads(Activations())
    for start, size in zip((0, 40, 80), SIZES, strict=True):
        made.inputs.append(torch.arange(start, start + size, dtype=torch.float32)[:, None].expand(-1, 8))
        choices = torch.randint(0, 3, (size, 2), generator=draw).to(torch.int16)
        choices[5, 0] = 9
        if start == 40:
            choices[7, 1] = 3
        made.choices.append(choices)
    return made


def routed(enough: int, dense: Reads | None = None) -> tuple[Reads, RoutedTokens]:
    made = reads()
    return made, RoutedTokens(made, dense, enough, 4)


def test_an_expert_with_enough_tokens_has_exactly_its_own():
    made, tokens = routed(enough=20)
    assert tokens.tokens == 100 and tokens.counts[3] == 1
    for expert in range(3):
        own = [made.inputs[i][(made.choices[i] == expert).any(1)] for i in range(3)]
        assert tokens.missing(expert) == 0 and tokens.counts[expert] >= 20
        found = [X for X, dense in tokens.of(expert) if dense is None]
        assert torch.equal(torch.cat(found), torch.cat(own))


def test_an_expert_with_few_tokens_takes_others_evenly_spread():
    _, tokens = routed(enough=20)
    assert tokens.missing(3) == 19
    chosen = torch.cat([X[:, 0] for X, _ in tokens.of(3)]).tolist()
    assert 47 in chosen and len(chosen) == len(set(chosen))
    assert 20 <= len(chosen) <= 20 + len(SIZES)
    for start, size in zip((0, 40, 80), SIZES, strict=True):
        inside = [c for c in chosen if start <= c < start + size]
        assert abs(len(inside) - 0.2 * size) <= 2
    gaps = torch.tensor(sorted(chosen)).diff()
    assert gaps.max() <= 7


def test_there_are_never_more_tokens_than_all():
    _, tokens = routed(enough=1000)
    assert tokens.missing(3) == 99
    assert sum(len(X) for X, _ in tokens.of(3)) == 100


def test_the_dense_model_is_followed_token_by_token():
    dense = reads()
    for index in range(3):
        dense.inputs[index] = dense.inputs[index] + 1000
        dense.choices[index] = torch.zeros_like(dense.choices[index])  # its own router is not asked
    _, tokens = routed(enough=20, dense=dense)
    for expert in range(4):
        for X, in_dense in tokens.of(expert):
            assert torch.equal(in_dense, X + 1000)


def test_a_sublayer_that_does_not_reach_its_experts():
    stream = Activations()
    stream.append(torch.zeros(1, 4, 8))
    run = lambda stream, index: stream[index]  # noqa: E731
    sublayer_pass = SimpleNamespace(run=run, monitor=Monitor(shown=False), streams=Streams(stream, None))
    with pytest.raises(RiaError, match="here: not used in this layer"):
        read_by(nn.Module(), sublayer_pass, stream, reads(), "here")

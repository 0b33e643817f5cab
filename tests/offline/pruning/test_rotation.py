"""Learned rotations of heads, against the loss that they are learned for, computed entry by entry."""

import itertools
from dataclasses import replace

import pytest
import torch

from ria_vllm.format.pattern import TWO_OF_FOUR
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix
from ria_vllm.offline.sublayer import rotating

KV, SHARE, D, IN, OUT = 2, 2, 8, 24, 20


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(count: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(draw(count, D, D, seed=seed).double()).Q


def inverse_of(width: int, seed: int) -> torch.Tensor:
    X = draw(3 * width, width, seed=seed) * (0.2 + draw(width, seed=seed + 1).abs())
    return torch.linalg.inv(X.T @ X)


def heads_in_other_channels(rotations: torch.Tensor) -> rotating.Heads:
    """Heads whose weights have few large entries, seen from channels that were rotated by `rotations` [KV, D, D]."""
    sparse = draw(KV, D, IN) * (draw(KV, D, IN, seed=1) > 0.3)
    outputs = draw(KV * SHARE, D, OUT, seed=2) * (draw(KV * SHARE, D, OUT, seed=3) > 0.3)
    heads = rotating.Heads(sparse, torch.ones(IN), outputs, torch.eye(D).expand(KV * SHARE, D, D))
    values, outputs = heads.rotated(rotations.float())
    return replace(heads, values=values, outputs=outputs)


def lost(heads: rotating.Heads, rotations: torch.Tensor, draws: int = 20) -> float:
    """What the mask loses in v and o, as shares of whole groups. A removed entry costs w^2 over its diagonal entry
    of the inverse."""
    v = {
        (kv * D + r, c): float((rotations[kv, r] @ heads.values[kv, :, c].double()) ** 2 / heads.values_cost[c])
        for kv in range(KV) for r in range(D) for c in range(IN)
    }  # fmt: skip
    o = {}
    for head, e in itertools.product(range(KV * SHARE), range(D)):
        row = rotations[head // SHARE, e]
        cost = float(row @ heads.outputs_cost[head].double() @ row)
        for r in range(OUT):
            o[r, head * D + e] = float((row @ heads.outputs[head, :, r].double()) ** 2) / cost
    total, generator = 0.0, torch.Generator().manual_seed(5)
    for _ in range(draws):
        v_order, o_order = (torch.randperm(n, generator=generator).tolist() for n in (IN, KV * SHARE * D))
        for scores, order, rows in ((v, v_order, KV * D), (o, o_order, OUT)):
            gone = whole = 0.0
            for r, first in itertools.product(range(rows), range(0, len(order) - 3, 4)):
                group = sorted(scores[r, c] for c in order[first : first + 4])
                gone, whole = gone + sum(group[:2]), whole + sum(group)
            total += gone / whole
    return total / draws


def test_what_is_learned_is_orthogonal_and_loses_less():
    heads = heads_in_other_channels(orthogonal(KV, 7))
    found = rotating.learned(heads, 0)
    assert found.dtype == torch.float64 and found.shape == (KV, D, D)
    torch.testing.assert_close(found @ found.mT, torch.eye(D).double().expand(KV, D, D), rtol=0, atol=1e-12)
    before, after = (lost(heads, one) for one in (torch.eye(D).double().expand(KV, D, D), found))
    assert after < 0.85 * before, (before, after)


def test_the_loss_is_that_of_every_entry():
    heads = rotating.Heads(
        draw(KV, D, IN), inverse_of(IN, 3).diagonal(), draw(KV * SHARE, D, OUT, seed=4),
        torch.stack([inverse_of(D, 10 + head) for head in range(KV * SHARE)]),
    )  # fmt: skip
    rotations = orthogonal(KV, 8)
    generator = torch.Generator().manual_seed(6)
    mean = sum(float(rotating._lost(heads, rotations.float(), generator, TWO_OF_FOUR)) for _ in range(60)) / 60
    assert mean == pytest.approx(lost(heads, rotations, 60), rel=0.01)


def test_a_part_of_large_linears_is_looked_at(monkeypatch):
    monkeypatch.setattr(rotating, "SAMPLED", 12)
    heads = heads_in_other_channels(orthogonal(KV, 7))
    identity = torch.eye(D).double().expand(KV, D, D)
    assert lost(heads, rotating.learned(heads, 0)) < 0.9 * lost(heads, identity)


def test_rotated_weights_are_the_same_function():
    """Attention adds up values of tokens, with other weights in each head that reads them."""
    heads = heads_in_other_channels(orthogonal(KV, 9))
    rotations, x = orthogonal(KV, 11).float(), draw(5, IN)
    mixing = draw(KV * SHARE, 5, 5, seed=12)

    def function(values: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        read = torch.einsum("tc,kdc->ktd", x, values).repeat_interleave(SHARE, 0)
        return torch.einsum("hst,htd,hdo->so", mixing, read, outputs)

    want = function(heads.values, heads.outputs)
    torch.testing.assert_close(function(*heads.rotated(rotations)), want, rtol=1e-4, atol=1e-4)


def test_the_same_for_the_same_seed():
    heads = heads_in_other_channels(orthogonal(KV, 7))
    assert torch.equal(rotating.learned(heads, 1), rotating.learned(heads, 1))


@pytest.mark.parametrize("values", [torch.zeros(KV, D, IN), None], ids=["zeros", "already sparse"])
def test_nothing_to_gain(values):
    """Half of all entries are zero, two in every group of any order, so nothing is lost as it is."""
    kept = torch.zeros(KV, D, IN)
    kept[:, :, :2] = draw(KV, D, 2)
    outputs = torch.zeros(KV * SHARE, D, OUT)
    outputs[0, :2] = draw(2, OUT)
    heads = rotating.Heads(
        kept if values is None else values, torch.ones(IN), outputs, torch.eye(D).expand(KV * SHARE, D, D)
    )
    assert rotating.learned(heads, 0) is None


def test_the_inverse_of_a_gram_matrix():
    X = draw(50, 300)  # singular; wider than a block
    gram = SymmetricMatrix.of(X.T @ X)
    damped = (X.T @ X).double()
    damped.diagonal().add_(0.1 * damped.diagonal().mean())
    torch.testing.assert_close(rotating.inverse_of(gram).double() @ damped, torch.eye(300).double(), rtol=0, atol=1e-3)
    nothing = SymmetricMatrix.of(torch.zeros(8, 8))
    assert torch.equal(rotating.inverse_of(nothing), torch.eye(8))

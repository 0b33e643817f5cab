"""The loss against torch's own functions in float64."""

import pytest
import torch
import torch.nn.functional as F

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.divergence import divergence
from ria_vllm.offline.distill.loss import Loss, in_chunks, next_token, relative_error

TOKENS, VOCABULARY = 7, 50


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_in_chunks_the_sum_and_its_gradient_are_those_of_the_whole(chunk):
    hidden = torch.randn(TOKENS, 16).requires_grad_(True)
    head, teacher = torch.randn(VOCABULARY, 16), logits(0)

    def function(part: torch.Tensor, rows: slice) -> torch.Tensor:
        return divergence(teacher[rows], part @ head.T).sum()

    found = in_chunks(function, hidden, chunk)
    (3 * found).backward()
    gradient, hidden.grad = hidden.grad, None
    whole = function(hidden, slice(None))
    (3 * whole).backward()
    assert torch.allclose(found, whole) and torch.allclose(gradient, hidden.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(in_chunks(function, hidden, chunk), whole)


def test_relative_error_counts_each_token_by_its_own_norm():
    teacher = [torch.randn(2, 3, 8) * torch.tensor([1.0, 100.0, 0.01])[:, None] for _ in range(2)]
    student = [one * 1.1 for one in teacher]
    assert torch.allclose(relative_error(student, teacher), torch.tensor(0.01), rtol=1e-4)


def test_next_token_leaves_out_the_last():
    found = next_token(logits(0)[:2], torch.tensor([5, -1]))
    assert torch.allclose(found, torch.stack([F.cross_entropy(logits(0)[:1], torch.tensor([5])), torch.tensor(0.0)]))


def test_terms_and_weights():
    assert Loss.parse("kl") == Loss(kl=1.0)
    assert Loss.parse("kl=0.5, hidden") == Loss(kl=0.5, hidden=1.0)
    assert Loss.parse("text=2") == Loss(kl=0.0, text=2.0)
    assert Loss.parse(str(Loss(kl=0.25, text=1e-3))) == Loss(kl=0.25, text=1e-3)


@pytest.mark.parametrize("text", ["", "kl=", "kl=x", "kll", "kl=-1", "kl=0", "kl=nan", "kl=inf", "kl=1;text=1"])
def test_what_is_no_loss_is_refused(text):
    with pytest.raises(RiaError, match="--loss"):
        Loss.parse(text)

"""The loss against torch's own functions in float64."""

import pytest
import torch
import torch.nn.functional as F

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.loss import Loss, Top, divergence, in_chunks, next_token, relative_error

TOKENS, VOCABULARY = 7, 50


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Of probabilities [tokens, n], float64."""
    return F.kl_div(student.log(), teacher, reduction="none").sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_of_all_logits(temperature):
    teacher, student = logits(0), logits(1)
    wanted = kl(*(torch.softmax(x.double() / temperature, -1) for x in (teacher, student))) * temperature**2
    assert torch.allclose(divergence(teacher, student, temperature).double(), wanted, rtol=1e-5)
    assert torch.allclose(divergence(teacher, teacher, temperature), torch.zeros(TOKENS), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_divergence_where_all_but_the_most_probable_tokens_count_as_one(k, temperature):
    teacher, student = logits(0), logits(1)
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    order = p.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    merged = [torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) if k < VOCABULARY else x for x in (p, q)]
    found = divergence(Top.of(teacher, k, temperature), student, temperature)
    assert torch.allclose(found.double(), kl(*merged) * temperature**2, rtol=1e-4, atol=1e-6)


def test_a_certain_teacher_leaves_nothing_to_the_others():
    teacher, student = torch.full((1, VOCABULARY), -1e4), logits(1)[:1].requires_grad_(True)
    teacher[0, 3] = 0.0
    found = divergence(Top.of(teacher, 4, 1.0), student)
    assert torch.allclose(found, F.cross_entropy(student, torch.tensor([3])), rtol=1e-5)
    found.sum().backward()
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("k", [0, 8])
def test_tokens_that_the_teacher_excludes_count_as_nothing(k):
    teacher, student = logits(0), logits(1).requires_grad_(True)
    teacher[:, 5:] = -torch.inf
    p, q = torch.softmax(teacher.double(), -1)[:, :5], torch.softmax(student.double(), -1)[:, :5]
    found = divergence(Top.of(teacher, k, 1.0) if k else teacher, student)
    assert torch.allclose(found.double(), (p * (p / q).log()).sum(-1), rtol=1e-4)
    found.sum().backward()
    assert bool(student.grad.isfinite().all())


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

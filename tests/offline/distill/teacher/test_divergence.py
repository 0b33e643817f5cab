"""The divergence and its gradient against torch's own functions and autograd in float64."""

import pytest
import torch

from ria_vllm.offline.distill.teacher import divergence as module
from ria_vllm.offline.distill.teacher.divergence import divergence, in_chunks

TOKENS, VOCABULARY = 7, 50


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def formula(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """For float64 logits, by the definition, with autograd's gradient."""
    p, q = (torch.softmax(x, -1) for x in (teacher, student))
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum(-1)


@pytest.mark.parametrize("excluded", [0, 5, 45])
@pytest.mark.parametrize("block", [1 << 17, 3 * VOCABULARY])
def test_it_and_its_gradient_are_those_of_autograd(block, excluded, monkeypatch):
    """With other factors for each token, as a weight or a mean gives them. `excluded` of the teacher's logits are
    -inf."""
    monkeypatch.setattr(module, "BLOCK", block)
    teacher, student = logits(0).double(), logits(1).double().requires_grad_(True)
    teacher[:, VOCABULARY - excluded :] = -torch.inf
    factors = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    wanted, found = formula(teacher, student), divergence(teacher, student)
    (slope,) = torch.autograd.grad(wanted, student, factors)
    assert found.dtype == torch.float64 and torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(found, student, factors)[0], slope, rtol=1e-10, atol=1e-12)
    single = student.detach().float().requires_grad_(True)
    found = divergence(teacher.float(), single)
    assert found.dtype == torch.float32
    (found_slope,) = torch.autograd.grad(found, single, factors.float())
    assert torch.allclose(found_slope.double(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_what_is_not_a_number_does_not_count_as_nothing(of):
    both = {"teacher": logits(0), "student": logits(1)}
    both[of][2] = torch.nan
    found = divergence(both["teacher"], both["student"])
    assert found.isnan().tolist() == [row == 2 for row in range(TOKENS)]


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_of_bfloat16_logits_it_is_computed_in_float32(factor):
    """Nor is the factor rounded: 0.3 would become 0.3008, and every gradient too large by as much."""
    teacher, student = (logits(seed).bfloat16() for seed in (0, 1))
    student.requires_grad_(True)
    wide = student.detach().double().requires_grad_(True)
    wanted, found = formula(teacher.double(), wide), divergence(teacher, student)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=1e-5)
    (factor * found.sum()).backward()
    (factor * wanted.sum()).backward()
    assert student.grad.dtype == torch.bfloat16
    assert torch.allclose(student.grad.double(), wide.grad, rtol=2**-7, atol=1e-6)
    large = wide.grad.abs() > 1e-4
    assert abs(float((student.grad.double() / wide.grad)[large].mean()) - 1) < 1e-3


def test_a_student_that_excludes_what_the_teacher_expects_diverges_without_limit():
    teacher, student = logits(0)[:2], logits(1)[:2]
    student[0, 3] = -torch.inf
    found = divergence(teacher, student)
    assert found[0] == torch.inf and bool(found[1].isfinite())
    teacher[0, 3] = -torch.inf
    assert bool(divergence(teacher, student).isfinite().all())


@pytest.mark.parametrize("chunk", [3, 100])
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

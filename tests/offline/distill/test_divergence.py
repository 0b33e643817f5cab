"""The divergence and its gradient against the definition and autograd in float64."""

import pytest
import torch

from ria_vllm.offline.distill import divergence as module
from ria_vllm.offline.distill.divergence import divergence

TOKENS, VOCABULARY = 7, 50


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def formula(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    p, q = (torch.softmax(x.double(), -1) for x in (teacher, student))
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum(-1)


@pytest.mark.parametrize("excluded", [0, 5, 45])
@pytest.mark.parametrize(("block", "dtype"), [(1 << 17, torch.float32), (3 * VOCABULARY, torch.bfloat16)])
def test_it_and_its_gradient_are_those_of_autograd(block, dtype, excluded, monkeypatch):
    """`excluded` of the teacher's logits are -inf."""
    monkeypatch.setattr(module, "BLOCK", block)
    teacher, student = logits(0).to(dtype), logits(1).to(dtype)
    teacher[:, VOCABULARY - excluded :] = -torch.inf
    wide, slope = student.double().requires_grad_(), torch.empty_like(student)
    wanted, found = formula(teacher, wide), divergence(teacher, student, slope)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(divergence(teacher, student), found)
    following = torch.arange(TOKENS) % 5
    all_three = divergence(teacher, student, following=following)
    entropies = [torch.nn.functional.cross_entropy(x.double(), following, reduction="none") for x in (student, teacher)]
    assert torch.equal(all_three[0], found) and torch.allclose(all_three[1:].double(), torch.stack(entropies))
    (gradient,) = torch.autograd.grad(wanted.sum(), wide)
    assert torch.allclose(slope.double(), gradient, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_what_is_not_a_number_does_not_count_as_nothing(of):
    both = {"teacher": logits(0), "student": logits(1)}
    both[of][2] = torch.nan
    found = divergence(both["teacher"], both["student"])
    assert found.isnan().tolist() == [row == 2 for row in range(TOKENS)]


def test_a_student_that_excludes_what_the_teacher_expects_diverges_without_limit():
    teacher, student = logits(0)[:2], logits(1)[:2]
    student[0, 3] = -torch.inf
    found = divergence(teacher, student)
    assert found[0] == torch.inf and bool(found[1].isfinite())
    teacher[0, 3] = -torch.inf
    assert bool(divergence(teacher, student).isfinite().all())

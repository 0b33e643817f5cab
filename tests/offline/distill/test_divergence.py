"""The divergence and its gradient against torch's own functions and autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from ria_vllm.offline.distill import divergence as module
from ria_vllm.offline.distill.divergence import Top, divergence

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


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("of", ["teacher", "student"])
def test_what_is_not_a_number_does_not_count_as_nothing(k, of):
    both = {"teacher": logits(0), "student": logits(1)}
    both[of][2] = torch.nan
    found = divergence(Top.of(both["teacher"], k, 1.0) if k else both["teacher"], both["student"])
    assert found.isnan().tolist() == [row == 2 for row in range(TOKENS)]


def formula(teacher: torch.Tensor, student: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """For float64 logits, by the definition, with autograd's gradient. k = 0: all tokens one by one."""
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    if k:
        order = p.argsort(-1, descending=True)
        p, q = p.gather(-1, order), q.gather(-1, order)
        p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) if k < VOCABULARY else x for x in (p, q))
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum(-1) * temperature**2


@pytest.mark.parametrize("excluded", [0, 5, 45])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [0, 1, 8, VOCABULARY])
@pytest.mark.parametrize("block", [1 << 17, 3 * VOCABULARY])
def test_the_gradient_is_autograds(block, k, temperature, excluded, monkeypatch):
    """With other factors for each token, as a weight or a mean gives them. `excluded` of the teacher's logits are
    -inf."""
    monkeypatch.setattr(module, "BLOCK", block)
    teacher, student = logits(0).double(), logits(1).double().requires_grad_(True)
    teacher[:, VOCABULARY - excluded :] = -torch.inf
    factors = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    wanted = formula(teacher, student, k, temperature)
    (slope,) = torch.autograd.grad(wanted, student, factors)
    top = Top(*torch.log_softmax(teacher / temperature, -1).topk(k, dim=-1)[::-1]) if k else teacher
    found = divergence(top, student, temperature)
    assert found.dtype == torch.float64 and torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(found, student, factors)[0], slope, rtol=1e-10, atol=1e-12)
    single = student.detach().float().requires_grad_(True)
    top = Top.of(teacher.float(), k, temperature) if k else teacher.float()
    found = divergence(top, single, temperature)
    assert found.dtype == torch.float32
    (found_slope,) = torch.autograd.grad(found, single, factors.float())
    assert torch.allclose(found_slope.double(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_of_bfloat16_logits_it_is_computed_in_float32(factor):
    """Nor is the factor rounded: 0.3 would become 0.3008, and every gradient too large by as much."""
    teacher, student = (logits(seed).bfloat16() for seed in (0, 1))
    student.requires_grad_(True)
    wide = student.detach().double().requires_grad_(True)
    wanted, found = formula(teacher.double(), wide, 0, 1.0), divergence(teacher, student)
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

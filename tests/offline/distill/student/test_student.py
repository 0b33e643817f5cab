"""Training against a plain loop over dense weights with masks, with torch's own AdamW and KL divergence."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import ria_vllm.hf.install  # noqa: F401  loads pruned folders
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.distill.divergence import divergence
from ria_vllm.offline.distill.student.parameters import AdamW
from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.distill.teacher import asked
from ria_vllm.offline.model.run.hf import load_model

EXACT = AdamW(first=torch.float32, second=torch.float32, clip=0.0)
CPU = torch.device("cpu")


def batches(steps: int) -> torch.Tensor:
    return torch.randint(2, 250, (steps, 2, 48), generator=torch.Generator().manual_seed(0))


def plain(folder, dense, lr: float, steps: int) -> dict[str, torch.Tensor]:
    """The weights after some steps of a dense model with masks, by the names of its parameters."""
    # Torch's fused attention would leave out Gemma 2's soft cap.
    attention = "eager" if AutoConfig.from_pretrained(dense).model_type == "gemma2" else None
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, attn_implementation=attention)
        for one in (dense, folder)
    )
    sparse = {f"{name}.weight" for name in Reader(folder).sparse_names}
    chosen = {name: p for name, p in student.named_parameters() if name in sparse}
    masks = {name: p.detach() != 0 for name, p in chosen.items()}
    optimizer = torch.optim.AdamW(chosen.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for tokens in batches(steps):
        mine = student(input_ids=tokens)
        with torch.no_grad():
            wanted = teacher(input_ids=tokens)
        logs = [torch.log_softmax(one.logits.flatten(0, 1), -1) for one in (wanted, mine)]
        loss = F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
        student.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            chosen[name].grad.mul_(mask)
        optimizer.step()
    return {name: p.detach() for name, p in chosen.items()}


def ours(folder, dense, lr: float, steps: int, save_memory: bool) -> Student:
    teacher = load_model(str(dense), CPU, "float32")
    student = Student(Reader(folder), load_model(str(folder), CPU, "float32"), save_memory, EXACT)
    student.pace.lr = lr
    for student.pace.number, tokens in enumerate(batches(steps), 1):
        logits = student.logits(tokens)
        slope = torch.empty_like(logits)
        divergence(asked(teacher, tokens), logits.detach(), slope)
        logits.backward(slope / len(slope))
    return student


@pytest.mark.parametrize(("family", "save_memory"), [("llama", False), ("gemma2", True), ("gemma4-e2b", False)])
def test_weights_become_those_of_a_plain_loop(family, save_memory, pruned):
    dense, folder = pruned(family)
    mine = ours(folder, dense, 1e-3, 6, save_memory)
    wanted, reader = plain(folder, dense, 1e-3, 6), Reader(folder)
    assert set(reader.sparse_names) == set(mine.trained) == {name.removesuffix(".weight") for name in wanted}
    before = dict(load_model(str(folder), CPU, "float32").named_parameters())
    for name, parameter in mine.model.named_parameters():
        if name not in wanted:
            assert torch.equal(parameter, before[name]), name
            continue
        weight = wanted[name]
        assert torch.equal(parameter == 0, weight == 0)
        # AdamW's steps do not depend on a gradient's size: where it is all but 0, rounding decides.
        far = ~torch.isclose(parameter, weight, rtol=1e-3, atol=2e-5)
        assert far.sum() <= max(1, far.numel() / 10_000) and (parameter - weight).abs().max() < 1e-3, name
        assert (parameter - before[name]).abs().max() > 1e-3

"""Training against a plain loop over dense weights with masks, with torch's own AdamW and KL divergence."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from compressing import run_small
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from wrappers import tiny_wrapper  # noqa: F401

import ria_vllm.hf.install  # noqa: F401  loads pruned folders
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.distill.logits import TwoPart
from ria_vllm.offline.distill.loss import Loss
from ria_vllm.offline.distill.parameters import AdamW, Pace
from ria_vllm.offline.distill.start import Start
from ria_vllm.offline.distill.student import Student
from ria_vllm.offline.distill.teacher import Teacher
from ria_vllm.offline.model.run.hf import load_model

EXACT = AdamW(first=torch.float32, second=torch.float32, clip=0.0)
CPU = torch.device("cpu")


def batches(steps: int) -> torch.Tensor:
    return torch.randint(2, 250, (steps, 2, 48), generator=torch.Generator().manual_seed(0))


def plain(folder, dense, also, weights: dict[str, float], lr: float, steps: int) -> dict[str, torch.Tensor]:
    """The weights after some steps of a dense model with masks, by the names of its parameters."""
    # Torch's fused attention would leave out Gemma 2's soft cap.
    attention = "eager" if AutoConfig.from_pretrained(dense).model_type == "gemma2" else None
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, attn_implementation=attention)
        for one in (dense, folder)
    )
    sparse = {f"{name}.weight" for name in Reader(folder).sparse_names}
    masks = {name: p.detach() != 0 for name, p in student.named_parameters() if name in sparse}
    kinds = {name: _kind(name) for name, _ in student.named_parameters()}
    chosen = {n: p for n, p in student.named_parameters() if n in masks or kinds[n] in also}
    optimizer = torch.optim.AdamW(chosen.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    layers = [outputs_of_layers(model) for model in (student, teacher)] if weights.get("hidden") else []
    for tokens in batches(steps):
        mine = student(input_ids=tokens)
        with torch.no_grad():
            wanted = teacher(input_ids=tokens)
        loss = 0
        if weights.get("kl"):
            logs = [torch.log_softmax(one.logits.flatten(0, 1), -1) for one in (wanted, mine)]
            loss += weights["kl"] * F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
        if weights.get("text"):
            logits = mine.logits[:, :-1].flatten(0, 1)
            total = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
            loss += weights["text"] * total / tokens.numel()
        if weights.get("hidden"):
            errors = [(a - b).square().sum(-1) / b.square().sum(-1) for a, b in zip(*(one.values() for one in layers))]
            loss += weights["hidden"] * sum(error.mean() for error in errors) / len(errors)
        student.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            if chosen[name].grad is not None:  # nothing of the loss depends on it
                chosen[name].grad.mul_(mask)
        optimizer.step()
    return {name: p.detach() for name, p in chosen.items()}


def outputs_of_layers(model) -> dict[int, torch.Tensor]:
    """Number of a decoder layer -> what it returns to the next one, whenever the model has been called."""
    found: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, output, number=number: found.update({number: output}))
    return found


def _kind(name: str) -> str | None:
    """What --train calls a parameter."""
    return "norms" if "norm" in name else "biases" if name.endswith(".bias") else None


def ours(folder, dense, also, loss: Loss, lr: float, steps: int, save_memory: bool) -> Student:
    teacher = Teacher(TwoPart(load_model(str(dense), CPU, "float32"), "teacher"), layers=bool(loss.hidden))
    pace, model = Pace(lr=lr), TwoPart(load_model(str(folder), CPU, "float32"), "student")
    student = Student(Start(folder), model, EXACT, pace, also, save_memory)
    for number, tokens in enumerate(batches(steps), 1):
        pace.number = number
        total, _ = student.loss(tokens, teacher.answer(tokens, []), teacher, loss)
        (total / tokens.numel()).backward()
    return student


def check_near(mine: Student, wanted: dict[str, torch.Tensor]) -> None:
    for name, weight in wanted.items():
        found = mine.two.model.get_parameter(name)
        assert torch.equal(found == 0, weight == 0)
        # AdamW's steps do not depend on a gradient's size: where it is all but 0, rounding decides.
        far = ~torch.isclose(found, weight, rtol=1e-3, atol=2e-5)
        assert far.sum() <= far.numel() / 10_000 and (found - weight).abs().max() < 1e-3, name


@pytest.mark.parametrize(
    ("family", "also"),
    [("llama", ("norms",)), ("gemma2", ("norms",)), ("llama-mha", ("norms", "biases")), ("gemma4-e2b", ("norms",))],
    ids=str,
)
@pytest.mark.parametrize("save_memory", [False, True])
def test_weights_become_those_of_a_plain_loop(family, also, save_memory, pruned):
    dense, folder = pruned(family)
    mine = ours(folder, dense, also, Loss(), 1e-3, 6, save_memory)
    wanted = plain(folder, dense, also, {"kl": 1.0}, 1e-3, 6)
    start = Start(folder)
    assert {f"{name}.weight" if name in start.linears else name for name in mine.trained} == set(wanted)
    check_near(mine, wanted)
    moved = start.linear(start.linears[0]).dense() - mine.two.model.get_parameter(f"{start.linears[0]}.weight")
    assert moved.abs().max() > 1e-3
    assert ("biases" in also) == any(name.endswith(".bias") for name in wanted)


def test_biases_stay_unless_they_are_asked_for(pruned):
    dense, folder = pruned("llama-mha")
    mine, before = ours(folder, dense, ("norms",), Loss(), 1e-3, 2, False), Reader(folder)
    biases = [name for name in before.dense_names if name.endswith(".bias")]
    assert biases and not set(biases) & set(mine.trained)
    assert all(torch.equal(mine.two.model.get_parameter(name), before.tensor(name)) for name in biases)


@pytest.mark.parametrize("family", ["llama", "gemma4-e2b"])
@pytest.mark.parametrize("weights", [{"kl": 0.5, "text": 0.3, "hidden": 2.0}, {"hidden": 1.0}], ids=str)
def test_all_terms_of_the_loss(family, weights, pruned):
    """Hidden states are compared after each layer. Where they are all that counts, the last norm does not move."""
    dense, folder = pruned(family)
    mine = ours(folder, dense, ("norms",), Loss(**{"kl": 0.0} | weights), 1e-3, 4, "kl" in weights)
    check_near(mine, plain(folder, dense, ("norms",), weights, 1e-3, 4))
    last = "model.norm.weight"
    assert torch.equal(mine.tensors(last)[last], Start(folder).others[last]) == ("kl" not in weights)


@pytest.mark.parametrize("also", [("norms",), ("norms", "scales")], ids=str)
@pytest.mark.parametrize("weights", ["float", "int8", "int4-g32"])
def test_what_is_stored_is_what_the_model_reads(weights, also, pruned):
    dense, folder = pruned(weights=weights)
    mine = ours(folder, dense, also, Loss(), 2e-3, 3, False)
    start = Start(folder)
    changed = 0
    for name in mine.trained:
        stored = mine.tensors(name)
        if name not in start.linears:
            assert torch.equal(stored[name], mine.two.model.get_parameter(name))
            continue
        before = start.linear(name)
        parts = {part: stored[f"{name}.{part}"] for part in before.parts}
        assert torch.equal(parts["bitmask"], before.parts["bitmask"])
        assert before.format.check(parts, before.shape) is None
        after = type(before)(name, before.format, parts, stored[f"{name}.input_permutation"], before.dtype)
        assert torch.equal(after.dense(), mine.two.model.get_parameter(f"{name}.weight"))
        changed += int((after.dense() != before.dense()).sum())
        scales = [one.parts["weight_scale"] for one in (before, after) if "weight_scale" in one.parts]
        assert not scales or torch.equal(*scales) == ("scales" not in also)
    assert changed > 0


def test_norms_start_from_the_file_and_not_from_what_the_model_holds(pruned, tmp_path):
    """A folder whose norms are more exact than the dtype that the model computes in."""
    _, folder = pruned()
    copy = shutil.copytree(folder, tmp_path / "copy")
    name, file = "model.layers.0.input_layernorm.weight", copy / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    exact = torch.full_like(tensors[name], 1 + 2**-12)
    save_file(tensors | {name: exact}, file, metadata=metadata)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).eval()
    assert not torch.equal(model.get_parameter(name).float(), exact)
    student = Student(Start(copy), TwoPart(model, "student"), AdamW(), Pace(), ("norms",), False)
    assert torch.equal(student.tensors(name)[name], exact)


def test_towers_that_no_text_goes_through_are_not_trained(tiny_wrapper, text, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    run_small(tiny_wrapper("llava"), folder, text)
    model = load_model(str(folder), CPU, "float32")
    student = Student(Start(folder), TwoPart(model, "student"), AdamW(), Pace(), ("norms", "biases"), False)
    of_tower = [name for name, _ in model.named_parameters() if "vision" in name and "norm" in name]
    assert of_tower and not [name for name in student.trained if "vision" in name or "projector" in name]
    assert any("norm" in name for name in student.trained)


@pytest.mark.parametrize("weights", ["float", "int4-g32"])
@pytest.mark.parametrize("also", [("norms",), ("norms", "scales")], ids=str)
def test_what_is_stored_is_what_was_trained_though_the_folder_is_another_by_then(also, weights, pruned, tmp_path):
    """With the masks, scales and dtypes from the start."""
    dense, like = pruned(weights=weights)
    folder = shutil.copytree(like, tmp_path / "folder")
    mine = ours(folder, dense, also, Loss(), 2e-3, 2, False)
    before = {name: mine.tensors(name) for name in mine.trained}
    shutil.rmtree(folder)
    shutil.copytree(pruned(weights=weights, method="magnitude")[1], folder)
    assert {"model.norm.weight", Start(folder).linears[0]} <= before.keys()
    for name, tensors in before.items():
        after = mine.tensors(name)
        assert after.keys() == tensors.keys() and all(torch.equal(after[key], one) for key, one in tensors.items())

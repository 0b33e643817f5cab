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

import ria_vllm.hf  # noqa: F401  loads pruned folders
from ria_vllm.checkpoint import Reader
from ria_vllm.offline.distill.logits import TwoPart
from ria_vllm.offline.distill.loss import Loss
from ria_vllm.offline.distill.parameters import AdamW, Pace
from ria_vllm.offline.distill.start import Start
from ria_vllm.offline.distill.student import Student
from ria_vllm.offline.distill.teacher import Teacher
from ria_vllm.offline.model.hf import load_model

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
    for tokens in batches(steps):
        mine = student(input_ids=tokens, output_hidden_states=True)
        with torch.no_grad():
            wanted = teacher(input_ids=tokens, output_hidden_states=True)
        loss = 0
        if weights.get("kl"):
            logs = [torch.log_softmax(one.logits.flatten(0, 1), -1) for one in (wanted, mine)]
            loss += weights["kl"] * F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
        if weights.get("text"):
            logits = mine.logits[:, :-1].flatten(0, 1)
            total = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
            loss += weights["text"] * total / tokens.numel()
        if weights.get("hidden"):
            # transformers' last hidden state is the one after the final norm, so only the first layer is compared here.
            error = (mine.hidden_states[1] - wanted.hidden_states[1]).square().sum(-1)
            loss += weights["hidden"] * (error / wanted.hidden_states[1].square().sum(-1)).mean()
        student.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            chosen[name].grad.mul_(mask)
        optimizer.step()
    return {name: p.detach() for name, p in chosen.items()}


def _kind(name: str) -> str | None:
    """What --train calls a parameter."""
    return "norms" if "norm" in name else "biases" if name.endswith(".bias") else None


def ours(folder, dense, also, loss: Loss, lr: float, steps: int, save_memory: bool, layers: int = 2) -> Student:
    teacher = Teacher(TwoPart(load_model(str(dense), CPU, "float32"), "teacher"), layers=bool(loss.hidden))
    pace, model = Pace(lr=lr), TwoPart(load_model(str(folder), CPU, "float32"), "student")
    student = Student(Start(folder), model, EXACT, pace, also, save_memory)
    teacher.model.layers, student.two.layers = (m.layers[:layers] for m in (teacher.model, student.two))
    for number, tokens in enumerate(batches(steps), 1):
        pace.number = number
        total, _ = student.loss(tokens, teacher.answer(tokens, []), teacher, loss)
        (total / tokens.numel()).backward()
    return student


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
    parameters = dict(mine.two.model.named_parameters())
    for name, weight in wanted.items():
        assert torch.equal(parameters[name] == 0, weight == 0)
        # AdamW's steps do not depend on a gradient's size: where it is all but 0, rounding decides.
        far = ~torch.isclose(parameters[name], weight, rtol=1e-3, atol=2e-5)
        assert far.sum() <= far.numel() / 10_000 and (parameters[name] - weight).abs().max() < 1e-3, name
    moved = start.linear(start.linears[0]).dense() - parameters[f"{start.linears[0]}.weight"]
    assert moved.abs().max() > 1e-3
    assert ("biases" in also) == any(name.endswith(".bias") for name in wanted)


def test_biases_stay_unless_they_are_asked_for(pruned):
    dense, folder = pruned("llama-mha")
    mine, before = ours(folder, dense, ("norms",), Loss(), 1e-3, 2, False), Reader(folder)
    biases = [name for name in before.dense_names if name.endswith(".bias")]
    assert biases and not set(biases) & set(mine.trained)
    assert all(torch.equal(mine.two.model.get_parameter(name), before.tensor(name)) for name in biases)


def test_all_terms_of_the_loss(pruned):
    """The first layer's hidden state, of a model whose other layers are not compared."""
    dense, folder = pruned()
    weights = {"kl": 0.5, "text": 0.3, "hidden": 2.0}
    mine = ours(folder, dense, (), Loss(**weights), 1e-3, 4, True, layers=1)
    for name, weight in plain(folder, dense, (), weights, 1e-3, 4).items():
        assert torch.allclose(mine.two.model.get_parameter(name), weight, rtol=1e-3, atol=2e-5), name


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


@torch.no_grad()
def divergence_from(dense, student) -> float:
    """Over the tokens of ten batches."""
    tokens = batches(10).flatten(0, 1)
    wanted, mine = (model(input_ids=tokens).logits.log_softmax(-1) for model in (dense, student))
    return float((wanted.exp() * (wanted - mine)).sum(-1).mean())


def test_the_loss_falls_and_other_tensors_stay(pruned):
    dense, folder = pruned(reconstruct="none")
    first = load_model(str(folder), CPU, "float32")
    before, teacher = first.get_input_embeddings().weight, load_model(str(dense), CPU, "float32")
    mine = ours(folder, dense, ("norms",), Loss(), 1e-3, 10, False)
    assert divergence_from(teacher, mine.two.model) < 0.85 * divergence_from(teacher, first)
    assert torch.equal(mine.two.model.get_input_embeddings().weight, before)
    assert not mine.two.model.get_input_embeddings().weight.requires_grad


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


def test_gradients_pass_through_rounded_inputs(pruned):
    """The inputs of pruned linears are rounded in the forward pass, and the loss still falls."""
    dense, folder = pruned(weights="int8", activations="int8", reconstruct="none")
    first, teacher = load_model(str(folder), CPU, "float32"), load_model(str(dense), CPU, "float32")
    unrounded = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name in Start(folder).linears:
        unrounded.get_parameter(f"{name}.weight").data.copy_(first.get_parameter(f"{name}.weight").data)
    tokens = batches(1)[0]
    assert not torch.equal(first(input_ids=tokens).logits, unrounded(input_ids=tokens).logits)
    mine = ours(folder, dense, ("norms",), Loss(), 1e-3, 10, True)
    assert divergence_from(teacher, mine.two.model) < 0.85 * divergence_from(teacher, first)
    assert all(bool((trained.second > 0).any()) for trained in mine.trained.values())

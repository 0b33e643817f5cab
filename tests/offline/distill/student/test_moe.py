"""MoE: the experts that transformers stacks are trained one by one, and written as they were stored."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compressing import run_small
from moe import save_moe
from sparse_llama import masks
from torch import nn
from transformers import AutoModelForCausalLM

import ria_vllm.hf.install  # noqa: F401  loads pruned folders
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.distill.divergence import divergence
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.distill.student.parameters import AdamW
from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.distill.teacher import asked
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.progress import Monitor

CPU = torch.device("cpu")
EXPERTS = 8
RATE = 1e-3
MakeMoe = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def moe(text, tmp_path_factory) -> MakeMoe:
    """(kind, options of `Recipe`) -> (the dense folder, the pruned one), of two layers with eight experts. Do not write
    into them."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str, **options) -> tuple[Path, Path]:
        key = f"{kind} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("moe")
            save_moe(folder / "dense", kind, num_experts=EXPERTS, num_local_experts=EXPERTS)
            run_small(folder / "dense", folder / "pruned", text, **options)
            made[key] = folder / "dense", folder / "pruned"
        return made[key]

    return get


def linear_in(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A linear of the checkpoint [out, in], as a view of the model's tensors."""
    if ".experts." not in name:
        return tensors[f"{name}.weight"]
    module, number, leaf = name.replace("block_sparse_moe", "mlp").rsplit(".", 2)
    leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
    stack = tensors[f"{module}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][int(number)]
    if f"{module}.down_proj_bias" in tensors:  # gpt-oss: [in, out], and gate and up alternate
        stack = stack.T
        return {"gate_proj": stack[0::2], "up_proj": stack[1::2]}.get(leaf, stack)
    half = len(stack) // 2
    return {"gate_proj": stack[:half], "up_proj": stack[half:]}.get(leaf, stack)


def batches() -> list[torch.Tensor]:
    """So few tokens that no step reaches all experts."""
    return list(torch.randint(2, 250, (6, 1, 3), generator=torch.Generator().manual_seed(0)))


def plain(folder: Path, dense: Path) -> dict[str, torch.Tensor]:
    """The linears [out, in] after some steps of torch's AdamW, which has the kept entries of each as a parameter."""
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    teacher = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    weights = {name: p.detach() for name, p in student.named_parameters()}
    kept = {name.removesuffix(".weight"): mask for name, mask in masks(folder).items()}
    trained = {name: nn.Parameter(linear_in(weights, name)[mask]) for name, mask in kept.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for tokens in batches():
        logs = [model(input_ids=tokens).logits.flatten(0, 1).log_softmax(-1) for model in (student, teacher)]
        student.zero_grad()
        F.kl_div(logs[0], logs[1].detach(), log_target=True, reduction="batchmean").backward()
        gradients = {name: p.grad for name, p in student.named_parameters()}
        for name, mask in kept.items():
            trained[name].grad = linear_in(gradients, name)[mask]
        optimizer.step()
        for name, mask in kept.items():
            linear_in(weights, name)[mask] = trained[name].detach()
    return {name: linear_in(weights, name) for name in kept}


@pytest.mark.parametrize(("kind", "save_memory"), [("mixtral", False), ("gpt_oss", True)])
def test_experts_become_those_of_a_plain_loop(kind, save_memory, moe):
    dense, folder = moe(kind)
    wanted, reader = plain(folder, dense), Reader(folder)
    model, teacher = (load_model(str(one), CPU, "float32") for one in (folder, dense))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = Student(reader, model, save_memory, AdamW(first=torch.float32, second=torch.float32, clip=0.0))
    student.pace.lr = RATE
    for student.pace.number, tokens in enumerate(batches(), 1):
        logits = student.logits(tokens)
        slope = torch.empty_like(logits)
        divergence(asked(teacher, tokens), logits.detach(), slope)
        logits.backward(slope / len(slope))
    after = dict(model.state_dict())
    assert set(student.trained) == set(wanted)
    for name, weight in wanted.items():
        mine, first = linear_in(after, name), linear_in(before, name)
        assert torch.equal(mine == 0, weight == 0)
        # AdamW's steps do not depend on a gradient's size: where it is all but 0, rounding decides.
        far = ~torch.isclose(mine, weight, rtol=1e-3, atol=2e-5)
        assert far.sum() <= far.numel() / 1000 and (mine - weight).abs().max() < RATE, name
        assert ".experts." in name or (mine - first).abs().max() > RATE / 2, name
    stacks = {name for name in after if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    linears = {f"{name}.weight" for name in reader.sparse_names if ".experts." not in name}
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - stacks - linears)


def run(dense: Path, folder: Path, out: Path, text: Path, settings: Settings = Settings(), **options) -> dict:
    fixed = {"tokens": 8 * 16, "seq_len": 8, "batch": 2, "text": str(text), "lr": 1e-3, "evals": 4}
    return distill(folder, str(dense), out, Distillation(**fixed | options), settings, Monitor(shown=False))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3_moe", {"weights": "int8", "activations": "int8"}),
        ("gpt_oss", {"weights": "int4", "group_size": 32}),
    ],
    ids=str,
)
def test_the_folder_holds_what_was_trained(kind, options, moe, students, text, tmp_path):
    dense, folder = moe(kind, **options)
    run(dense, folder, tmp_path / "out", text, lr=2e-2)
    before, after = Reader(folder), Reader(tmp_path / "out")
    assert list(after.problems()) == []
    assert set(after.files) == set(before.files) and after.schema.experts == before.schema.experts
    assert after.schema.folds == before.schema.folds and after.schema.weights == before.schema.weights
    assert after.permutations.keys() == before.permutations.keys()
    assert all(torch.equal(after.permutations[name], p) for name, p in before.permutations.items())
    for name in before.files:
        equal = torch.equal(before.tensor(name), after.tensor(name))
        left = any(
            word in name for word in ("router", ".gate.", "_proj_bias", "embed", "lm_head", "sinks", "norm", "bias")
        )
        if name.endswith((".bitmask", ".shape")) or left:
            assert equal, name
        elif ".experts." not in name:
            assert not equal, name
    experts = {name for name in before.sparse_names if ".experts." in name}
    moved = {name for name in experts if not torch.equal(before.dense(name), after.dense(name))}
    assert len(experts) == 2 * EXPERTS * 3 and len(moved) > len(experts) / 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in students[0].model.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name

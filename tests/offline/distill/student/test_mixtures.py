"""Mixtures: the experts that transformers stacks are trained one by one, and written as they were stored."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compressing import digests, run_small
from moe import save_moe
from sparse_llama import masks
from torch import nn
from transformers import AutoModelForCausalLM

import ria_vllm.hf.install  # noqa: F401  loads pruned folders
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.distill.student import places
from ria_vllm.offline.distill.student.parameters import AdamW, Pace, TrainedExpert
from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.distill.teacher.teacher import read
from ria_vllm.offline.distill.teacher.two_part import TwoPart
from ria_vllm.offline.distill.train import Training
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.progress import Monitor

CPU = torch.device("cpu")
EXPERTS = 8
DECAY, RATE = 0.1, 1e-3
Mixture = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def mixture(text, tmp_path_factory) -> Mixture:
    """(kind, options of `Recipe`) -> (the dense folder, the pruned one), of two layers with eight experts. Do not write
    into them."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str, **options) -> tuple[Path, Path]:
        key = f"{kind} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("mixture")
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


def plain(folder: Path, dense: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[bool]]]:
    """The linears [out, in] after some steps of torch's AdamW, which has the kept entries of each of them as a
    parameter; and, for each linear of an expert, which steps have reached it."""
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    teacher = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    weights = {name: p.detach() for name, p in student.named_parameters()}
    kept = {name.removesuffix(".weight"): mask for name, mask in masks(folder).items()}
    trained = {name: nn.Parameter(linear_in(weights, name)[mask]) for name, mask in kept.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    chosen: dict[str, set[int]] = {}
    for path, module in student.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, args, path=path: chosen.update({path: {*args[1].flatten().tolist()}})
            )
    reached: dict[str, list[bool]] = {name: [] for name in kept if ".experts." in name}
    for tokens in batches():
        logs = [model(input_ids=tokens).logits.flatten(0, 1).log_softmax(-1) for model in (student, teacher)]
        student.zero_grad()
        F.kl_div(logs[0], logs[1].detach(), log_target=True, reduction="batchmean").backward()
        gradients = {name: p.grad for name, p in student.named_parameters()}
        for name, mask in kept.items():
            trained[name].grad = linear_in(gradients, name)[mask]
            if name in reached:
                module, number, _ = name.replace("block_sparse_moe", "mlp").rsplit(".", 2)
                reached[name].append(int(number) in chosen[module])
                if not reached[name][-1]:
                    assert not trained[name].grad.any()
                    trained[name].grad = None
        optimizer.step()
        for name, mask in kept.items():
            linear_in(weights, name)[mask] = trained[name].detach()
    return {name: linear_in(weights, name) for name in kept}, reached


@pytest.mark.parametrize(("kind", "save_memory"), [("mixtral", False), ("gpt_oss", True)])
def test_experts_become_those_of_a_plain_loop(kind, save_memory, mixture):
    """Where no token reaches an expert, torch gets no gradient, and so leaves it and its moments alone."""
    dense, folder = mixture(kind)
    wanted, reached = plain(folder, dense)
    reader, pace = Reader(folder), Pace(lr=RATE)
    adamw = AdamW(first=torch.float32, second=torch.float32, clip=0.0, weight_decay=DECAY)
    model = TwoPart(load_model(str(folder), CPU, "float32"), "student")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    student = Student(reader, model, adamw, pace, save_memory)
    teacher = TwoPart(load_model(str(dense), CPU, "float32"), "teacher")
    for number, tokens in enumerate(batches(), 1):
        pace.number = number
        loss, _ = student.loss(tokens, read(teacher, tokens), teacher, 0.0)
        (loss / tokens.numel()).backward()
    after = dict(model.model.state_dict())
    assert set(student.trained) == set(wanted) and len(reached) == 2 * EXPERTS * 3
    for name, weight in wanted.items():
        mine, first = linear_in(after, name), linear_in(before, name)
        assert torch.equal(mine == 0, weight == 0)
        # AdamW's steps do not depend on a gradient's size: where it is all but 0, rounding decides.
        far = ~torch.isclose(mine, weight, rtol=1e-3, atol=2e-5)
        assert far.sum() <= far.numel() / 1000 and (mine - weight).abs().max() < RATE, name
        assert (mine - first).abs().max() > RATE / 2 or not any(reached.get(name, [True])), name
        if name in reached:
            assert int(student.trained[name].steps) == sum(reached[name])
            assert torch.equal(mine, first) or any(reached[name])
    # Some come to rest, and some go on after that.
    assert any(one[0] and not one[1] for one in reached.values())
    assert any(a and not b and c for one in reached.values() for a, b, c in zip(one, one[1:], one[2:]))
    stacks = {name for name in after if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    linears = {f"{name}.weight" for name in reader.sparse_names if ".experts." not in name}
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - stacks - linears)


@pytest.mark.parametrize("kind", ["gpt_oss"])
def test_as_many_bytes_for_each_kept_weight_as_elsewhere(kind, mixture):
    """Beside a number of 8 bytes for each linear of an expert."""
    _, folder = mixture(kind)
    student = Student(Reader(folder), TwoPart(load_model(str(folder), CPU), "student"), AdamW(), Pace())
    for name, trained in student.trained.items():
        held = sum(tensor.nbytes for tensor in trained.state().values())
        assert held == 10 * trained.values.numel() + 8 * (".experts." in name)


def run(dense: Path, folder: Path, out: Path, text: Path, settings: Settings = Settings(), **options) -> dict:
    fixed = {"tokens": 8 * 16, "seq_len": 8, "batch": 2, "text": str(text), "lr": 1e-3, "evals": 4}
    return distill(folder, str(dense), out, Distillation(**fixed | options), settings, Monitor(shown=False))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"weights": "int8", "activations": "int8"}),
        ("gpt_oss", {"weights": "int4", "group_size": 32}),
    ],
    ids=str,
)
def test_the_folder_holds_what_was_trained(kind, options, mixture, students, text, tmp_path):
    dense, folder = mixture(kind, **options)
    run(dense, folder, tmp_path / "out", text, lr=2e-2 if options else 1e-3)
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
    rested = {name for name in experts if not int(students[0].trained[name].steps)}
    assert len(experts) == 2 * EXPERTS * 3 and moved == experts - rested and moved
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in students[0].two.model.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name


def test_stopped_and_resumed_it_writes_the_same_bytes(mixture, students, text, tmp_path, monkeypatch):
    dense, folder = mixture("qwen3_moe", weights="int8")
    options = {"tokens": 4 * 16, "evals": 1}
    run(dense, folder, tmp_path / "whole", text, **options)
    counts = {int(one.steps) for one in students[0].trained.values() if isinstance(one, TrainedExpert)}
    assert len(counts) > 1 and max(counts) == 4
    step = Training._step

    def stopping(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_step", stopping)
        run(dense, folder, tmp_path / "out", text, Settings(save_every=0), **options)
    run(dense, folder, tmp_path / "out", text, Settings(resume=True), **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_experts_that_stay_dense_are_not_trained(mixture, students, text, tmp_path):
    dense, folder = mixture("gpt_oss", ignore=("model.layers.1.mlp.experts",))
    run(dense, folder, tmp_path / "out", text)
    before, after = Reader(folder), Reader(tmp_path / "out")
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(before.tensor(name), after.tensor(name))
    assert {name.split(".")[2] for name in students[0].trained if ".experts." in name} == {"0"}


def test_experts_that_this_transformers_holds_otherwise_are_refused(mixture, monkeypatch):
    _, folder = mixture("mixtral")
    monkeypatch.setattr(places, "experts_modules", lambda _: {})
    model = TwoPart(load_model(str(folder), CPU, "float32"), "student")
    with pytest.raises(RiaError, match=r"layers\.0\.block_sparse_moe\.experts: .* does not hold these 8 experts"):
        Student(Reader(folder), model, AdamW(), Pace())

"""Whole runs against a plain loop with rounding, AdamW and learning rates of its own."""

import math
from pathlib import Path

import e4m3
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

import ria_vllm.hf.install  # noqa: F401  loads pruned folders
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.format.formats import FORMATS
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.distill.text import training_text
from ria_vllm.offline.model.run.hf import load_tokenizer
from ria_vllm.progress import Monitor

RANGES = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}


class Linear(nn.Module):
    """A pruned linear in training: it multiplies with rounded values, and exact ones are trained, in the stored order.

    The gradient of a value passes straight through the rounding. A scale is trained as the logarithm of what it has
    changed by, with LSQ's gradient.
    """

    def __init__(self, linear: SparseLinear, rounds_inputs: bool):
        super().__init__()
        parts, order = linear.parts, linear.input_permutation
        self.rounds_inputs = rounds_inputs
        self.order = torch.arange(linear.shape[1]) if order is None else order.long()
        self.mask = (parts["bitmask"][..., None] >> torch.arange(8) & 1).flatten(1).bool()
        self.values = nn.Parameter(linear.dense()[:, self.order].clone())
        self.range = RANGES.get(linear.format.name.partition("-")[0])
        self.in_e4m3, self.in_multiples = linear.format.name == "fp8", linear.format.name.startswith("int4-g")
        self.first_scales = parts["weight_scale"] if self.range else None
        self.changes = nn.Parameter(torch.zeros(self.first_scales.shape)) if self.range else None

    def scales(self) -> torch.Tensor:
        """As they are stored, of each value. Those of int4 groups are multiples of one number for each row, of four
        bits: the least of which 15 are no less than the row's largest."""
        scales = self.first_scales.float() * self.changes.detach().exp()
        if self.in_multiples:
            largest = scales.amax(1, keepdim=True) / 15
            power = 2.0 ** largest.log2().floor()
            unit = (largest / power * 8).ceil() / 8 * power
            multiples = (scales / unit).round().clamp(1, 15) * unit
            scales = torch.where(self.changes.detach().any(1, keepdim=True), multiples, scales)
        scales = scales.to(self.first_scales.dtype)
        return scales.float().repeat_interleave(self.values.shape[1] // scales.shape[1], 1)

    def read(self) -> torch.Tensor:
        if self.range is None:
            return self.values * self.mask
        values, scales = self.values.detach(), self.scales()
        scaled = (values / scales).clamp(*self.range)
        rounded = (e4m3.nearest(scaled).float() if self.in_e4m3 else scaled.round()) * scales
        within = (values >= self.range[0] * scales) & (values <= self.range[1] * scales)
        of_scales = torch.where(within, rounded - values, rounded)
        changes = self.changes.repeat_interleave(values.shape[1] // self.changes.shape[1], 1)
        straight = (self.values - values) + of_scales * (changes - changes.detach())
        return (rounded + straight) * self.mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rounds_inputs:
            largest = x.detach().abs().amax(-1, keepdim=True)
            most = torch.full_like(largest, 448 if self.in_e4m3 else 127)
            scaled = (x.detach() * (most / largest)).clamp(-most, most)
            x = x + ((e4m3.nearest(scaled).float() if self.in_e4m3 else scaled.round()) * (largest / most) - x).detach()
        return F.linear(x, self.read()[:, self.order.argsort()])

    @torch.no_grad()
    def draw_back(self) -> int:
        """Bring values to at most a step beyond what their scales can hold; how many were farther."""
        if self.range is None:
            return 0
        step = 32 if self.in_e4m3 else 1
        low, high = ((end + side * step) * self.scales() for end, side in zip(self.range, (-1, 1)))
        far = ((self.values < low * (1 + 1e-6)) | (self.values > high * (1 + 1e-6))) & self.mask
        self.values.copy_(self.values.clamp(low, high))
        return int(far.sum())


class AdamW:
    """Of one tensor, with an update of at most a learning rate (the root mean square of gradient over running mean),
    and a first moment that is kept in bfloat16."""

    def __init__(self, parameter: nn.Parameter, mask: torch.Tensor | None = None, speed: float = 1):
        self.parameter, self.speed = parameter, speed
        self.mask = torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask
        self.first, self.second = torch.zeros_like(parameter), torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, number: int, lr: float) -> None:
        gradient = self.parameter.grad * self.mask
        self.parameter.grad = None
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.95 * self.second + 0.05 * gradient**2
        mean, square = self.first / (1 - 0.9**number), self.second / (1 - 0.95**number)
        jump = float((gradient**2 / square.clamp(min=1e-16))[self.mask].mean()) ** 0.5
        self.parameter -= self.speed * lr / max(1.0, jump) * mean / (square.sqrt() + 1e-8)
        self.first = self.first.bfloat16().float()


def rate(recipe: Distillation, step: int) -> float:
    """A rise to the learning rate, times half a cosine; the step is counted from 0."""
    rise = min(1.0, (step + 1) / (0.05 * recipe.steps))
    return recipe.lr * rise * math.cos(math.pi / 2 * step / recipe.steps) ** 2


def plain(dense: Path, folder: Path, recipe: Distillation) -> tuple[dict[str, Linear], int]:
    """After the recipe's steps: the pruned linears, and how many values were drawn back."""
    reader, teacher = Reader(folder), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model, linears = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}
    for name in reader.sparse_names:
        linears[name] = Linear(reader.linear(name), reader.schema.input_activations is not None)
        model.set_submodule(name, linears[name])
    optimizers = [AdamW(one.values, one.mask) for one in linears.values()]
    optimizers += [AdamW(one.changes, speed=10.0) for one in linears.values() if one.range]
    windows, _ = training_text(recipe, load_tokenizer(str(folder)), Monitor(shown=False))
    drawn = 0
    for step, tokens in enumerate(windows.long().view(recipe.steps, recipe.batch, -1)):
        with torch.no_grad():
            wanted = teacher(input_ids=tokens).logits.log_softmax(-1)
        mine = model(input_ids=tokens).logits.log_softmax(-1)
        (wanted.exp() * (wanted - mine)).sum(-1).mean().backward()
        for optimizer in optimizers:
            optimizer.step(step + 1, rate(recipe, step))
        drawn += sum(linear.draw_back() for linear in linears.values())
    return linears, drawn


def off(found: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> float:
    """How far two results are from each other, of how far training has moved."""
    found, wanted, before = (one.detach().double() for one in (found, wanted, before))
    return float((found - wanted).abs().mean() / (wanted - before).abs().mean())


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        *((name, "fp8" if name == "fp8" else "none") for name in FORMATS),
        ("int8", "int8"),
        ("int4-g32", "int8"),
    ],
)
def test_a_run_writes_what_a_plain_loop_trains(weights, activations, pruned, text, tmp_path, students):
    """In every weight format that `compress` writes."""
    asked, narrow = "int4-row" if weights == "int4" else weights, "128" in weights
    ignore = ("down_proj",) if narrow else ()  # its 192 in-features do not divide into groups of 128
    dense, folder = pruned(weights=asked, activations=activations, ignore=ignore)
    recipe = Distillation(tokens=512, seq_len=64, text=str(text), lr=2e-2 if "int4" in weights else 1e-3)
    distill(folder, str(dense), tmp_path / "out", recipe, Settings(), Monitor(shown=False))
    linears, drawn = plain(dense, folder, recipe)
    before, after, most = Reader(folder), Reader(tmp_path / "out"), {}
    for name, linear in linears.items():
        first, stored, trained = Linear(before.linear(name), False), after.linear(name), students[0].trained[name]
        most[name] = off(trained.values.flatten(), linear.values[linear.mask], first.values[linear.mask])
        most[f"{name} written"] = off(stored.dense()[:, linear.order], linear.read(), first.values)
        if linear.range:
            scales = [one.scales() for one in (Linear(stored, False), linear, first)]
            most[f"{name} scales"] = off(*scales)
    # Where a value or an input is in the middle between two integers, the last bits decide.
    limit = 1e-3 if activations == "none" and "int4-g" not in weights else 5e-2
    assert {after.linear(name).format.name for name in linears} == {weights}
    assert not {name: far for name, far in most.items() if far > limit}
    assert len(linears) == (12 if narrow else 14) and len(most) >= 2 * len(linears)
    assert (drawn > 0) == (weights not in ("float", "fp8"))  # fp8 has room: its last step is 32 wide

"""Sparse parameters: AdamW over kept weights only, stepping while the backward pass goes on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.student.layouts import GPU_BLOCK, Kept, Whole
from ria_vllm.offline.distill.student.rounding import StraightThrough

# Numbers that AdamW handles at a time on a CPU: all that it reads and writes of them stays in a core's cache.
CHUNK = 1 << 16

# What the kept values of some rows are rounded to before the forward pass reads them: (values [rows, in/2], rows) ->
# (rounded values, values as the optimizer goes on with them), both float32.
Rounding = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class AdamW:
    """The optimizer's constants.

    clip: the root mean square that a parameter's update may have, in units of the learning rate; 0: no limit. The norm
        of all gradients, by which training is usually clipped, is known only when all of them are, and here no two
        layers' gradients exist at once. This limit takes its place (as in Adafactor and StableAdamW): the square of
        each gradient over its running mean, averaged over the parameter, is large exactly when gradients jump.
    first, second: dtypes of the moments.
    speed: multiplies the learning rate.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    first: torch.dtype = torch.bfloat16
    second: torch.dtype = torch.float32
    speed: float = 1.0


@dataclass
class Pace:
    """What all parameters must know of the current step.

    number: of the step, from 1. last: whether the gradients of this backward pass are the last of the step.
    reduce: adds a gradient up over all processes, in place.
    """

    lr: float = 0.0
    number: int = 0
    last: bool = True
    reduce: Callable[[torch.Tensor], None] = field(default=lambda gradient: None)


def diverged(step: int, what: str) -> RiaError:
    """The error of training that diverges in a step, counted from 1."""
    return RiaError(f"step {step}: training diverged ({what}). Give a smaller --lr.")


class TrainedParameter:
    """A tensor in training: the model reads it in its own dtype, AdamW updates its kept entries in float32.

    As soon as its gradient is there (see `step_in_backward`), the kept entries are taken, and the tensor takes its
    step. If a step has several backward passes, the kept entries of the gradients are added up, in float32.

    Besides the tensor itself this takes 4 bytes for each kept entry (its exact value), those of the two moments (2 + 4
    with `AdamW`'s defaults), and a quarter of a byte for its place; 4 more where a step has several backward passes.
    Each scale that is trained takes 16.

    Args:
        parameter: of the model; its data is changed in place, where the layout says.
        layout: where the trained entries lie.
        values: float32, of the layout's shape: the entries to start from.
        rounding: for quantized formats; the gradient passes straight through it.
        scales: those that `rounding` reads, if they are trained too; they take their steps with this parameter.
    """

    def __init__(
        self,
        parameter: torch.nn.Parameter,
        layout: Kept | Whole,
        values: torch.Tensor,
        adamw: AdamW,
        pace: Pace,
        rounding: Rounding | None = None,
        scales: "TrainedParameter | None" = None,
    ):
        self.parameter, self.layout, self.adamw, self.pace, self.rounding = parameter, layout, adamw, pace, rounding
        self.scales = scales
        self.values = values
        self.first = torch.zeros_like(values, dtype=adamw.first)
        self.second = torch.zeros_like(values, dtype=adamw.second)
        self.gradient: torch.Tensor | None = None
        self.write()

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next steps depend on."""
        mine = {"values": self.values, "first": self.first, "second": self.second}
        scales = {} if self.scales is None else self.scales.state()
        return mine | {f"scales.{name}": tensor for name, tensor in scales.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        if self.scales is not None:
            self.scales.write()
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Put the current entries, rounded, into the model's tensor."""
        for rows in self.layout.rows():
            self.layout.put(self._rounded(rows), self.parameter.detach(), rows)

    def rounded(self) -> torch.Tensor:
        """The entries as the model reads them, but in float32."""
        return torch.cat([self.values[:0], *(self._rounded(rows) for rows in self.layout.rows())])

    def _rounded(self, rows: slice) -> torch.Tensor:
        if self.rounding is None:
            return self.values[rows]
        rounded, values = self.rounding(self.values[rows], rows)
        self.values[rows] = values
        return rounded

    @torch.no_grad()
    def arrived(self, dense: torch.Tensor) -> None:
        """Take the kept entries of a gradient of the parameter, and the step, if no more gradients belong to it."""
        with self.layout.remembered():
            if self.gradient is None:
                self.gradient = torch.empty_like(self.values)
                for rows in self.layout.rows():
                    self.gradient[rows] = self.layout.take(dense, rows)
            else:
                for rows in self.layout.rows():
                    self.gradient[rows] += self.layout.take(dense, rows)
            if self.pace.last:
                self.pace.reduce(self.gradient)
                self._step_all(self.gradient)
                self.gradient = None

    def _step_all(self, gradient: torch.Tensor) -> None:
        """The step of the scales, if they are trained, and of the values."""
        if self.scales is not None:
            assert isinstance(self.rounding, StraightThrough)
            blocks = list(self.layout.rows())
            parts = [self.rounding.of_scales(self.values[rows], gradient[rows], rows) for rows in blocks]
            self.scales._step(torch.cat([self.scales.values[:0], *parts]))
        self._step(gradient)

    def _number(self) -> int:
        """Of the step that is being taken, from 1."""
        return self.pace.number

    def _step(self, gradient: torch.Tensor) -> None:
        adamw, (beta1, beta2) = self.adamw, self.adamw.betas
        number = self._number()
        correct1, correct2 = 1 - beta1**number, 1 - beta2**number
        values, first, second, gradient = (
            tensor.view(-1).split(CHUNK if tensor.device.type == "cpu" else GPU_BLOCK)
            for tensor in (self.values, self.first, self.second, gradient)
        )
        ratio = self.values.new_tensor([0.0, self.values.numel()])  # sums of squared gradients over their means, of 1
        for mean, part in zip(second, gradient, strict=True):
            wide = mean.float().mul_(beta2).addcmul_(part, part, value=1 - beta2)
            mean.copy_(wide)
            ratio[0] += part.square().div_(wide.clamp(min=adamw.eps**2 * correct2)).sum()
        lr = self.pace.lr * adamw.speed
        squares, count = ratio.tolist()
        if not math.isfinite(squares):
            raise diverged(self.pace.number, "a gradient is not finite")
        if adamw.clip:
            lr /= max(1.0, math.sqrt(squares * correct2 / count) / adamw.clip)
        for value, mean, square, part in zip(values, first, second, gradient, strict=True):
            if adamw.weight_decay:
                value.mul_(1 - self.pace.lr * adamw.weight_decay)
            wide = mean.float().lerp_(part, 1 - beta1)
            mean.copy_(wide)
            # The corrections are numbers, and need no pass of their own: m / correct1 / (sqrt(v / correct2) + eps).
            root = square.float().sqrt().add_(adamw.eps * correct2**0.5)
            value.addcdiv_(wide, root, value=-lr * correct2**0.5 / correct1)
        for rows in self.layout.rows():
            self.layout.put(self._rounded(rows), self.parameter.detach(), rows)


class TrainedExpert(TrainedParameter):
    """A linear of an expert, or its scales, in training.

    A step in which no token reaches the expert gives it no gradient, and leaves it and its moments as they are. So it
    counts its own steps, in 8 bytes, as torch's AdamW does for each of its parameters.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.steps = torch.zeros((), dtype=torch.int64)

    def state(self) -> dict[str, torch.Tensor]:
        return super().state() | {"steps": self.steps}

    def _step_all(self, gradient: torch.Tensor) -> None:
        low, high = gradient.aminmax()  # NaN if there is any
        if low != 0 or high != 0:
            super()._step_all(gradient)

    def _step(self, gradient: torch.Tensor) -> None:
        self.steps += 1
        super()._step(gradient)

    def _number(self) -> int:
        return int(self.steps)


def step_in_backward(parameter: torch.nn.Parameter, parts: Sequence[TrainedParameter]) -> None:
    """From now on, what is trained of a parameter takes its steps as soon as the parameter's gradient is there.

    The gradient is freed then. So only one layer's gradients are alive at a time.
    """

    def arrived(parameter: torch.Tensor) -> None:
        dense, parameter.grad = parameter.grad, None
        for part in parts:
            part.arrived(dense)

    parameter.requires_grad_(True)
    parameter.register_post_accumulate_grad_hook(arrived)

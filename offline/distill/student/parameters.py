"""Sparse parameters: AdamW over kept weights only, stepping while the backward pass goes on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.student.layouts import GPU_BLOCK, Kept
from ria_vllm.offline.distill.student.rounding import StraightThrough

# Numbers that AdamW handles at a time on a CPU: all that it reads and writes of them stays in a core's cache.
CHUNK = 1 << 16
# The learning rate of the logarithms of scales, in that of weights, which are some hundredths large.
SCALES_SPEED = 10.0


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
    clip: float = 1.0
    first: torch.dtype = torch.bfloat16
    second: torch.dtype = torch.float32
    speed: float = 1.0


DEFAULTS = AdamW()


@dataclass
class Pace:
    """What all parameters must know of the current step.

    number: of the step, from 1.
    """

    lr: float = 0.0
    number: int = 0


def diverged(step: int, what: str) -> RiaError:
    """The error of training that diverges in a step, counted from 1."""
    return RiaError(f"step {step}: training diverged ({what}). Give a smaller --lr.")


class Moving:
    """Numbers that AdamW moves.

    Args:
        values: float32, changed in place.
    """

    def __init__(self, values: torch.Tensor, adamw: AdamW, pace: Pace):
        self.values, self.adamw, self.pace = values, adamw, pace
        self.first = torch.zeros_like(values, dtype=adamw.first)
        self.second = torch.zeros_like(values, dtype=adamw.second)

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next steps depend on."""
        return {"values": self.values, "first": self.first, "second": self.second}

    def _step(self, gradient: torch.Tensor) -> None:
        adamw, (beta1, beta2) = self.adamw, self.adamw.betas
        correct1, correct2 = 1 - beta1**self.pace.number, 1 - beta2**self.pace.number
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
            wide = mean.float().lerp_(part, 1 - beta1)
            mean.copy_(wide)
            # The corrections are numbers, and need no pass of their own: m / correct1 / (sqrt(v / correct2) + eps).
            root = square.float().sqrt().add_(adamw.eps * correct2**0.5)
            value.addcdiv_(wide, root, value=-lr * correct2**0.5 / correct1)


class TrainedParameter(Moving):
    """A linear in training: the model reads it in its own dtype, AdamW updates its kept entries in float32.

    As soon as its gradient is there (see `step_in_backward`), its kept entries are taken, and it takes its step.

    Besides the weight itself this takes 4 bytes for each kept entry (its exact value), those of the two moments (2 + 4
    with `AdamW`'s defaults), and a quarter of a byte for its place. Each scale takes 16.

    Args:
        parameter: of the model; its data is changed in place, where the layout says.
        layout: where the kept entries lie.
        values: float32 [out, in/2], the kept entries to start from.
        rounding: for quantized formats; the gradient passes straight through it. Its scales are trained, too: the
            logarithms of what they have changed by, so they stay positive.
    """

    def __init__(
        self,
        parameter: torch.nn.Parameter,
        layout: Kept,
        values: torch.Tensor,
        adamw: AdamW,
        pace: Pace,
        rounding: StraightThrough | None = None,
    ):
        super().__init__(values, adamw, pace)
        self.parameter, self.layout, self.rounding = parameter, layout, rounding
        self.scales: Moving | None = None
        if rounding is not None:
            self.scales = Moving(torch.zeros_like(rounding.first), replace(adamw, speed=SCALES_SPEED), pace)
        self._write()

    def state(self) -> dict[str, torch.Tensor]:
        scales = {} if self.scales is None else self.scales.state()
        return super().state() | {f"scales.{name}": tensor for name, tensor in scales.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self._write()

    def rounded(self) -> torch.Tensor:
        """The entries as the model reads them, but in float32."""
        return torch.cat([self.values[:0], *(self._rounded(rows) for rows in self.layout.rows())])

    @torch.no_grad()
    def arrived(self, dense: torch.Tensor) -> None:
        """Take the kept entries of a gradient of the parameter, and the step; that of the scales first."""
        blocks = list(self.layout.rows())
        gradient = torch.cat([self.values[:0], *(self.layout.take(dense, rows) for rows in blocks)])
        if self.rounding is not None and self.scales is not None:
            parts = [self.rounding.of_scales(self.values[rows], gradient[rows], rows) for rows in blocks]
            self.scales._step(torch.cat([self.scales.values[:0], *parts]))
        self._step(gradient)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Put the current entries, rounded by the current scales, into the model's weight."""
        if self.rounding is not None and self.scales is not None:
            self.rounding.scale(self.scales.values)
        for rows in self.layout.rows():
            self.layout.put(self._rounded(rows), self.parameter.detach(), rows)

    def _rounded(self, rows: slice) -> torch.Tensor:
        if self.rounding is None:
            return self.values[rows]
        rounded, values = self.rounding(self.values[rows], rows)
        self.values[rows] = values
        return rounded


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

"""What the teacher says of a text: computed when it is asked, or read from where an earlier pass has put it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.divergence import Top
from ria_vllm.offline.distill.logits import TwoPart
from ria_vllm.progress import Monitor
from ria_vllm.weight_format import name_of
from ria_vllm.writer import CheckpointWriter

# Tokens whose logits are in memory at a time.
CHUNK = 256


@dataclass(frozen=True)
class Answer:
    """What the teacher says of some windows, whose tokens follow each other.

    top: its most probable tokens, if they come from a cache; otherwise its logits follow from `hidden`.
    hidden: [tokens, hidden], what its head reads.
    layers: the outputs of its decoder layers [windows, tokens, hidden], if the loss needs them.
    """

    top: Top | None = None
    hidden: torch.Tensor | None = None
    layers: Sequence[torch.Tensor] = field(default_factory=list)


class Teacher:
    """The dense model, computed when it is asked.

    Args:
        model: frozen, in evaluation mode.
        layers: whether answers hold the outputs of its layers.
    """

    def __init__(self, model: TwoPart, layers: bool = False):
        self.model, self.layers = model, layers

    @torch.no_grad()
    def answer(self, tokens: torch.Tensor, numbers: Sequence[int]) -> Answer:
        """For int64 [windows, tokens]; `numbers` says which windows of the text they are.

        Raises:
            RiaError: a hidden state is not finite.
        """
        with captured(self.model.layers if self.layers else []) as outputs:
            hidden = _read(self.model, tokens)
        return Answer(hidden=hidden.flatten(0, 1), layers=list(outputs))


class CachedTeacher:
    """The dense model's most probable tokens, as `fill_cache` has written them."""

    def __init__(self, writer: CheckpointWriter, device: torch.device):
        self.writer, self.device = writer, device

    def answer(self, tokens: torch.Tensor, numbers: Sequence[int]) -> Answer:
        found = [self.writer.read(_key(number))[0] for number in numbers]
        ids = torch.cat([one["tokens"] for one in found]).to(self.device, torch.int64)
        return Answer(top=Top(ids, torch.cat([one["logs"] for one in found]).to(self.device, torch.float32)))


def fill_cache(
    writer: CheckpointWriter,
    model: TwoPart,
    windows: torch.Tensor,
    k: int,
    temperature: float,
    monitor: Monitor,
    mine: range,
    most: Callable[[int], int] | None = None,
) -> None:
    """Write the `k` most probable tokens after each token of each window: 6 bytes for each (int32 and float16).

    What is there already stays, so an interrupted pass goes on where it was.

    Args:
        windows: integers [windows, tokens].
        mine: the windows that this process writes.
        most: the largest of all processes' numbers, if the model is divided among them: then all must ask it equally
            often, and those that have less to write ask in vain.
    """
    missing = [number for number in mine if not writer.has(_key(number))]
    turns = len(missing) if most is None else most(len(missing))
    for turn in monitor.steps(range(turns), "asking the teacher", turns):
        number = missing[turn] if turn < len(missing) else 0
        top = most_probable(model, windows[number].long(), k, temperature)
        if turn < len(missing):
            writer.write(_key(number), {"tokens": top.tokens.int().cpu(), "logs": top.logs.half().cpu()})


@torch.no_grad()
def most_probable(model: TwoPart, window: torch.Tensor, k: int, temperature: float) -> Top:
    """What the teacher finds most probable after each token of a window, int64 [tokens].

    Raises:
        RiaError: a hidden state is not finite.
    """
    hidden = _read(model, window[None].to(model.model.device))[0]
    parts = [Top.of(model.logits(part), k, temperature) for part in hidden.split(CHUNK)]
    return Top(torch.cat([part.tokens for part in parts]), torch.cat([part.logs for part in parts]))


def _read(model: TwoPart, tokens: torch.Tensor) -> torch.Tensor:
    """The teacher's hidden states, checked: with a NaN in them, training would seem to diverge."""
    hidden = model.hidden(tokens)
    if not bool(hidden.isfinite().all()):
        raise RiaError(
            f"{model.name}: the teacher itself computes NaN or infinity in {name_of(hidden.dtype)}. Check that it "
            "works without pruning, or give --compute-dtype float32."
        )
    return hidden


@contextmanager
def captured(layers: Sequence[nn.Module] | nn.ModuleList) -> Iterator[list[torch.Tensor]]:
    """A list to which each of `layers` adds its output while the context lasts."""
    outputs: list[torch.Tensor] = []

    def keep(_: nn.Module, args: object, output: object) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])  # type: ignore[index]

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _key(number: int) -> str:
    return f"teacher-{number:08d}"

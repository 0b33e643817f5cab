"""The routed experts of a decoder layer, as transformers builds them: one module with the experts' weights stacked.

An expert's linears have names of their own, relative to the layer, though the model has no such modules:
`mlp.experts.3.gate_proj`, `mlp.experts.3.up_proj` and `mlp.experts.3.down_proj`. Their weights are [out, in], whatever
the module's layout is.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ria_vllm.experts_form import form_of

GATE, UP, DOWN = KINDS = ("gate", "up", "down")
"""The linears of an expert. `layer_schema.Experts` has the same names."""

_VIRTUAL = re.compile(r"(?P<path>.+)\.(?P<expert>[0-9]+)\.(?P<kind>gate|up|down)_proj")


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module holds its experts.

    path: of the module, relative to the layer.
    width: of the residual stream, which gate and up read and down writes.
    inner: the width between them.
    has_gate: there are gate projections, stacked with the up projections in `gate_up_proj`; else only `up_proj`.
    has_bias: each linear has a bias, in `gate_up_proj_bias` (or `up_proj_bias`) and `down_proj_bias`.
    interleaved: outputs of gate and up alternate, instead of following each other.
    transposed: the weights are stacked as [experts, in, out].
    weighted_inputs: the experts read tokens that are multiplied by the router's weights, and nothing multiplies their
        outputs.
    """

    path: str
    num_experts: int
    width: int
    inner: int
    has_gate: bool = True
    has_bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    weighted_inputs: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS if self.has_gate else (UP, DOWN)

    @property
    def first(self) -> tuple[str, ...]:
        """The linears that read the residual stream."""
        return tuple(kind for kind in self.kinds if kind != DOWN)

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Name of a stacked parameter of the module -> the linears in it."""
        return {"gate_up_proj" if self.has_gate else "up_proj": self.first, "down_proj": (DOWN,)}

    def linear(self, expert: int, kind: str) -> str:
        """The name of an expert's linear, relative to the layer."""
        return f"{self.path}.{expert}.{kind}_proj"

    def shape(self, kind: str) -> tuple[int, int]:
        """[out, in] of a linear."""
        return (self.width, self.inner) if kind == DOWN else (self.inner, self.width)

    @property
    def weights(self) -> int:
        """The number of weights of all experts."""
        return self.num_experts * len(self.kinds) * self.width * self.inner

    def joined(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The outputs of the linears `first`, [..., inner] each, in the order in which the module's gate expects them.

        Returns:
            [..., inner] or, with a gate, [..., 2 * inner].
        """
        if len(outputs) == 1:
            return outputs[0]
        return torch.stack(outputs, -1).flatten(-2) if self.interleaved else torch.cat(outputs, -1)

    def parted(self, stacked: torch.Tensor, parameter: str) -> dict[str, torch.Tensor]:
        """The linears of one expert in its part of a stacked parameter.

        Args:
            stacked: the parameter without its first dimension: a weight or, with one dimension, a bias.
            parameter: its name; one of `parameters`.

        Returns:
            linear -> [out, in] or [out], views.
        """
        kinds = self.parameters[parameter]
        rows = stacked.T if self.transposed and stacked.dim() == 2 else stacked
        if len(kinds) == 1:
            return {kinds[0]: rows}
        if self.interleaved:
            return {kind: rows[start :: len(kinds)] for start, kind in enumerate(kinds)}
        return dict(zip(kinds, rows.split(self.inner), strict=True))


def experts_modules(layer: nn.Module) -> dict[str, ExpertsLayout]:
    """The modules of routed experts in a decoder layer whose layout is known: path relative to the layer -> layout.

    These are the modules that transformers' `use_experts_implementation` decorates, and those of Llama 4. Parameters
    may be on the meta device.
    """
    found = {}
    for path, module in layer.named_modules():
        layout = _layout(path, module)
        if layout is not None:
            found[path] = layout
    return found


def other_experts(layer: nn.Module, width: int) -> dict[str, str]:
    """Modules that hold experts in some other way, and so stay dense: path relative to the layer -> why.

    Args:
        width: of the residual stream.
    """
    known = experts_modules(layer)
    return {
        path: f"transformers' {type(module).__name__} does not run its experts one by one"
        for path, module in layer.named_modules()
        if path not in known and other_weights(module, width)
    }


def other_weights(module: nn.Module, width: int) -> list[nn.Parameter]:
    """The module's own weights, if it is none of those that everything knows, such as nn.Linear.

    A router's weights and those of Mamba's scan are fewer than `width` * `width`, and do not count.
    """
    if isinstance(module, nn.Linear | nn.Embedding | _ConvNd | Conv1D):
        return []
    return [p for p in module.parameters(recurse=False) if p.dim() in (2, 3) and p.numel() >= width * width]


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(path of the experts, number, kind) of an expert's linear; None if the name is another one's."""
    found = _VIRTUAL.fullmatch(name)
    return None if found is None else (found["path"], int(found["expert"]), found["kind"])


def _layout(path: str, module: Any) -> ExpertsLayout | None:
    form = form_of(module)
    if not path or form is None:
        return None
    first = getattr(module, "gate_up_proj" if form.has_gate else "up_proj", None)
    down = getattr(module, "down_proj", None)
    if not all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in (first, down)):
        return None
    experts, *shape = down.shape
    width, inner = reversed(shape) if form.transposed else shape
    layout = ExpertsLayout(
        path, experts, width, inner, form.has_gate, form.has_bias, form.interleaved, form.transposed,
        form.weighted_inputs,
    )  # fmt: skip
    rows = len(layout.first) * inner
    wanted = (experts, width, rows) if layout.transposed else (experts, rows, width)
    return layout if tuple(first.shape) == wanted else None

"""How transformers builds the routed experts of a layer: one module with the weights of all experts stacked."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ria_vllm.format.stacks import split_rows

GATE, UP, DOWN = KINDS = ("gate", "up", "down")
"""The linears of an expert. `layer_schema.Experts` has the same names."""

# Its experts are not decorated like all others. transformers, too, knows them by this name where it replaces them.
LLAMA4 = "Llama4TextExperts"
FLAGS = ("has_gate", "has_bias", "is_concatenated", "is_transposed")
"""What transformers' `use_experts_implementation` says of a module."""


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module holds its experts.

    path: of the module, relative to the layer.
    width: of the residual stream, which gate and up read and down writes.
    inner: the width between them.
    has_gate: there are gate projections, stacked with the up projections in `gate_up_proj`; else only `up_proj`.
    has_bias: each linear has a bias, in `gate_up_proj_bias` (or `up_proj_bias`) and `down_proj_bias`.
    interleaved: outputs of gate and up alternate, instead of following each other.
    transposed: the weights are stacked as [experts, in, out] instead of [experts, out, in].
    weighted_inputs: the module is called with tokens that the router's weights have multiplied, for one expert after
        the other, and zeros where a token does not go to an expert: [experts * tokens, width]. All other modules are
        called with the tokens, the numbers of their experts, and the weights of these.
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
        return self.kinds[:-1]

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Name of a stacked parameter of the module -> the linears in it."""
        return {"gate_up_proj" if self.has_gate else "up_proj": self.first, "down_proj": (DOWN,)}

    def shape(self, kind: str) -> tuple[int, int]:
        """[out, in] of a linear."""
        return (self.width, self.inner) if kind == DOWN else (self.inner, self.width)

    def stacked_shape(self, parameter: str) -> tuple[int, int, int]:
        """The shape of one of `parameters`."""
        kinds = self.parameters[parameter]
        rows, columns = self.shape(kinds[0])
        rows *= len(kinds)
        return (self.num_experts, columns, rows) if self.transposed else (self.num_experts, rows, columns)

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
        return dict(zip(kinds, split_rows(rows, len(kinds), self.interleaved), strict=True))


def layout_of(module: Any, path: str = "") -> ExpertsLayout | None:
    """The layout of a module of experts; None if it is none, or one of another kind.

    These are the modules that transformers' `use_experts_implementation` decorates, and those of Llama 4. Parameters
    may be on the meta device.

    Args:
        path: of the module, relative to the layer.
    """
    is_llama4, down = type(module).__name__ == LLAMA4, getattr(module, "down_proj", None)
    flags: list[Any] = [True, False, True, True] if is_llama4 else [getattr(module, flag, None) for flag in FLAGS]
    if not all(isinstance(flag, bool) for flag in flags) or not isinstance(down, nn.Parameter) or down.dim() != 3:
        return None
    has_gate, has_bias, concatenated, transposed = flags
    experts, *shape = down.shape
    width, inner = reversed(shape) if transposed else shape
    layout = ExpertsLayout(path, experts, width, inner, has_gate, has_bias, not concatenated, transposed, is_llama4)
    shapes = {name: tuple(getattr(getattr(module, name, None), "shape", ())) for name in layout.parameters}
    return layout if all(shapes[name] == layout.stacked_shape(name) for name in shapes) else None


def experts_modules(model: nn.Module) -> dict[str, ExpertsLayout]:
    """The modules of routed experts in a decoder layer or a model whose layout is known: path in it -> layout."""
    found = {path: layout_of(module, path) for path, module in model.named_modules() if path}
    return {path: layout for path, layout in found.items() if layout is not None}

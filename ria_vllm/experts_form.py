"""How transformers' modules of routed experts hold their weights, and what they are called with."""

from dataclasses import dataclass
from typing import Any

# Its experts are not decorated like all others. transformers, too, knows them by this name where it replaces them.
LLAMA4 = "Llama4TextExperts"
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What `use_experts_implementation` says of a module."""


@dataclass(frozen=True)
class ExpertsForm:
    """The form of a module whose experts are stacked.

    has_gate: gate and up are stacked in `gate_up_proj`; else there is only `up_proj`.
    has_bias: each linear has a bias.
    transposed: the weights are [experts, in, out] instead of [experts, out, in].
    interleaved: outputs of gate and up alternate, instead of following each other.
    weighted_inputs: the module is called with tokens that the router's weights have multiplied, for one expert after
        the other, and zeros where a token does not go to an expert: [experts * tokens, width]. All other modules are
        called with the tokens, the numbers of their experts, and the weights of these.
    """

    has_gate: bool = True
    has_bias: bool = False
    transposed: bool = False
    interleaved: bool = False
    weighted_inputs: bool = False

    @property
    def weights(self) -> set[str]:
        """The names of the module's stacked weights."""
        return {"gate_up_proj" if self.has_gate else "up_proj", "down_proj"}


def form_of(module: Any) -> ExpertsForm | None:
    """The form of a module of experts; None if it is none, or one of another kind."""
    flags = [getattr(module, flag, None) for flag in FLAGS]
    known = [flag for flag in flags if isinstance(flag, bool)]
    if len(known) == len(FLAGS):
        has_gate, has_bias, transposed, concatenated = known
        return ExpertsForm(has_gate, has_bias, transposed, not concatenated)
    if type(module).__name__ == LLAMA4:
        return ExpertsForm(transposed=True, weighted_inputs=True)
    return None

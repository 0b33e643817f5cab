"""Where a model that transformers loaded has the pruned linears of its checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.format.stacks import Placement


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from.

    folder: with the weight files.
    placements: a parameter's name in the model as it was loaded -> what it holds.
    conversions: what transformers undoes to give tensors the names and shapes of the dense model's files.
    """

    folder: Path
    placements: dict[str, Placement]
    conversions: list[Any]


ORIGIN_ATTRIBUTE = "_ria_origin"
"""The attribute under which a model that transformers loaded from a compressed folder has its `Origin`."""


def inside_adapters(module: Any) -> Any:
    """The module itself, or the one that adapters of PEFT stand around, or that its `modules_to_save` has a copy of."""
    while True:  # getattr: what torch.compile wraps passes it on
        inside = (getattr(module, name, None) for name in ("original_module", "base_layer"))
        found = next((one for one in inside if isinstance(one, torch.nn.Module)), None)
        if found is None:
            return module
        module = found

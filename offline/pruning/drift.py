"""How far the pruned model's activations have drifted from the dense model's: what reconstruction makes up for.

A linear W reads X [tokens, in] in the pruned model. Its output is to be Y [tokens, out], so that what comes after it is
as in the dense model on its own path. All that least squares needs of Y is the pull (Y - X W^T)^T X [out, in] and the
gap ||Y - X W^T||_F^2.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from ria_vllm.offline.pruning.symmetric import SymmetricMatrix


class Drift(Protocol):
    """Both are over all calibration tokens."""

    def pull(self, weight: torch.Tensor) -> torch.Tensor:
        """(Y - X W^T)^T X [out, in] float32, for W [out, in]."""
        ...

    def gap(self, weight: torch.Tensor) -> float:
        """||Y - X W^T||_F^2."""
        ...


@dataclass(frozen=True)
class InputDrift:
    """The dense model's input D is known: Y = D W^T, of every linear that reads it.

    cross: (D - X)^T X [in, in]; gram: (D - X)^T (D - X) [in, in].
    """

    cross: torch.Tensor
    gram: torch.Tensor | SymmetricMatrix

    def pull(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float() @ self.cross

    def gap(self, weight: torch.Tensor) -> float:
        W = weight.float()
        return float(((W @ self.gram) * W).sum(dtype=torch.float64))


@dataclass(frozen=True)
class OutputDrift:
    """What the output of one linear lacks is known, R = Y - X W^T: of the residual stream that it joins, or by Y = D W^T.

    cross: R^T X [out, in]; square: ||R||_F^2.
    """

    cross: torch.Tensor
    square: float

    def pull(self, weight: torch.Tensor) -> torch.Tensor:
        return self.cross

    def gap(self, weight: torch.Tensor) -> float:
        return self.square

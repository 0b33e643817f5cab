"""How far the pruned model's activations have drifted from the dense model's, so that reconstruction can correct it.

A linear W reads X [tokens, in] in the pruned model. Its output should be Y [tokens, out], with which everything after
it is as in the dense model on its own path. Least squares needs only two things of Y: the cross term
(Y - X W^T)^T X [out, in] float32 (`cross_term`), and the squared residual ||Y - X W^T||_F^2 (`squared_residual`).
"""

from dataclasses import dataclass

import torch

from ria_vllm.offline.pruning.symmetric import SymmetricMatrix


@dataclass(frozen=True)
class InputDrift:
    """The dense model's input D is known, so Y = D W^T for every linear that reads it.

    cross: (D - X)^T X [in, in] float32; gram: (D - X)^T (D - X) [in, in] float32.
    """

    cross: torch.Tensor
    gram: SymmetricMatrix

    def cross_term(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float() @ self.cross

    def squared_residual(self, weight: torch.Tensor) -> float:
        W = weight.float()
        return float(((W @ self.gram) * W).sum(dtype=torch.float64))

    def divide(self, scales: torch.Tensor) -> None:
        """Divide the channels of X, and of D, by `scales` [in]; in place."""
        self.cross.div_(scales[:, None]).div_(scales)
        self.gram.divide(scales)


@dataclass(frozen=True)
class OutputDrift:
    """What the output of one linear lacks is known: R = Y - X W^T [tokens, out].

    R comes from the residual stream that the output is added to, or from Y = D W^T.

    cross: R^T X [out, in] float32; squared_norm: ||R||_F^2.
    """

    cross: torch.Tensor
    squared_norm: float

    def cross_term(self, weight: torch.Tensor) -> torch.Tensor:
        return self.cross

    def squared_residual(self, weight: torch.Tensor) -> float:
        return self.squared_norm

    def divide(self, scales: torch.Tensor) -> None:
        """Divide the channels of X by `scales` [in]; in place."""
        self.cross.div_(scales)


Drift = InputDrift | OutputDrift

"""ADMM for one linear alone."""

import torch

from ria_vllm.offline.pruning.admm import DAMPING, admm_solver
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix


def admm(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    iterations: int = 20,
    damping: float = DAMPING,
    cross_term=None,
) -> torch.Tensor:
    return admm_solver(SymmetricMatrix.of(gram), damping).solve(weight, mask, iterations, cross_term)[0]

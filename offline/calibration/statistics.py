"""The statistics of what linears read, summed over all calibration tokens.

The product of each chunk is float32, the sums are float64. So the order of the
chunks hardly shows in the rounded result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline.pruning.drift import Drift, InputDrift, OutputDrift
from ria_vllm.offline.pruning.symmetric import BLOCK, SymmetricMatrix


@dataclass
class Statistics:
    """What the linears of a group read: X [tokens, in], over all calibration tokens.

    norm: ||X_j|| [in] float32, the l2 norm of each input channel.
    gram: X^T X [in, in] float32; None if only norms were asked for.
    drift: how far X is from the dense model's input; None if the dense model is not followed.
    scales: [in] float32, by which the channels of X were divided, and those of the weights multiplied; None: by none.
    """

    norm: torch.Tensor
    gram: SymmetricMatrix | None
    drift: Drift | None = None
    scales: torch.Tensor | None = None

    def divide(self, scales: torch.Tensor) -> None:
        """Divide the channels of X, and of the dense model's input, by `scales` float32 [in]; in place."""
        self.norm /= scales
        if self.gram is not None:
            self.gram.divide(scales)
        if self.drift is not None:
            self.drift.divide(scales)
        self.scales = scales if self.scales is None else self.scales * scales


class GramSum(SymmetricMatrix):
    """The running Gram matrix X^T X [width, width], float64."""

    def __init__(self, width: int, device: torch.device):
        starts = range(0, width, BLOCK)
        sizes = [(min(BLOCK, width - start), width - start) for start in starts]
        super().__init__([torch.zeros(size, dtype=torch.float64, device=device) for size in sizes])

    def add(self, X: torch.Tensor) -> None:
        """Add a chunk's X [tokens, width] float32."""
        for start, stop, block in self.spans():
            block.add_(X[:, start:stop].T @ X[:, start:])

    def finish(self) -> SymmetricMatrix:
        """The matrix in float32. The sums are freed block by block on the way."""
        blocks = []
        while self.blocks:
            blocks.append(self.blocks.pop(0).float())
        return SymmetricMatrix(blocks)


@contextmanager
def products_in(compute_dtype: torch.dtype) -> Iterator[None]:
    """Where activations are computed in bfloat16, let CPUs multiply float32 as bfloat16, and sum in float32.

    Activations are the same numbers in both, so their products are exact. Drifts are rounded to 8 bits, as activations
    are; so is what a norm scales after the linear (Gemma's o and down). With AMX it takes a third of the time.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if compute_dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


class StatisticsSum:
    """The running sums behind the `Statistics` of one group.

    Args:
        width: in-features of the group's linears.
        with_gram: sum the Gram matrix, not just its diagonal.
        compute_dtype: the dtype in which the activations are computed.
    """

    def __init__(self, width: int, with_gram: bool, device: torch.device, compute_dtype: torch.dtype):
        self.width, self.device, self.compute_dtype = width, device, compute_dtype
        self.gram = GramSum(width, device) if with_gram else None
        self.squares = None if with_gram else torch.zeros(width, dtype=torch.float64, device=device)
        # The sums of the drift. Their shapes depend on its kind, so they are allocated when the first chunk comes.
        self.cross: torch.Tensor | None = None
        self.drift_gram: GramSum | None = None
        self.squared_norm = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, X: torch.Tensor) -> None:
        """Add a chunk of what the linears read, X [tokens, width] float32."""
        if self.gram is not None:
            with products_in(self.compute_dtype):
                self.gram.add(X)
        if self.squares is not None:
            self.squares.add_(X.square().sum(0))

    def add_input_drift(self, X: torch.Tensor, dense: torch.Tensor) -> None:
        """Add a chunk's drift, where the linears read X and, in the dense model, `dense`; both [tokens, width]."""
        drift = dense - X
        if self.drift_gram is None:
            self.drift_gram = GramSum(self.width, self.device)
        with products_in(self.compute_dtype):
            self.drift_gram.add(drift)
        self._add_cross(drift, X)

    def add_output_drift(self, X: torch.Tensor, missing: torch.Tensor) -> None:
        """Add a chunk's drift, where the linear reads X [tokens, width] and its output lacks `missing` [tokens, out].

        Only for a group of one linear.
        """
        self.squared_norm.add_(torch.linalg.vector_norm(missing).double() ** 2)
        self._add_cross(missing, X)

    def _add_cross(self, A: torch.Tensor, X: torch.Tensor) -> None:
        if self.cross is None:
            self.cross = torch.zeros(A.shape[1], self.width, dtype=torch.float64, device=self.device)
        with products_in(self.compute_dtype):
            for start in range(0, len(self.cross), BLOCK):  # adding makes a float64 copy of the product
                self.cross[start : start + BLOCK].add_(A[:, start : start + BLOCK].T @ X)

    def finish(self, place: str) -> Statistics:
        """The statistics of all tokens. This frees the sums.

        Args:
            place: what an error begins with.

        Raises:
            RiaError: NaN or infinite activations, also of the dense model alone.
        """
        squares = self.squares if self.gram is None else self.gram.diagonal()
        assert squares is not None
        _check_finite(squares, place, "in its input activations", self.compute_dtype)
        # The pruned model may be finite where the dense one overflows: then no error would be smaller than another.
        for total in (self.cross, self.squared_norm, None if self.drift_gram is None else self.drift_gram.diagonal()):
            if total is not None:
                _check_finite(total, place, "in the dense model's activations", self.compute_dtype)
        # These are large: each float64 sum is freed before the next float32 one is made.
        drift: Drift | None = None
        if self.cross is not None:
            cross, self.cross = self.cross.float(), None
            if self.drift_gram is not None:
                drift = InputDrift(cross, self.drift_gram.finish())
            else:
                drift = OutputDrift(cross, float(self.squared_norm))
        return Statistics(squares.sqrt().float(), None if self.gram is None else self.gram.finish(), drift)


def _check_finite(sums: torch.Tensor, place: str, where: str, compute_dtype: torch.dtype) -> None:
    # If one entry of X is not finite, neither is the sum of its channel's squares.
    if bool(sums.isfinite().all()):
        return
    advice = "Check that it works without pruning."
    if compute_dtype != torch.float32:
        advice = f"Give --compute-dtype float32. If that does not help: {advice[0].lower()}{advice[1:]}"
    raise RiaError(
        f"{place}: NaN or infinite values {where}. The model overflows on this text in "
        f"{name_of(compute_dtype)}. {advice}"
    )

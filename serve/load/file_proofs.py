"""Proofs of checkpoints that other programs wrote, made of their tensors on the way from the files to the model.

compressed-tensors writes no proofs, and to multiply all of a large model would take minutes. So a proof has `ROWS` rows
of each matrix, evenly spread, so that each tensor-parallel rank has some of them; the others are NaN, which proves
nothing. Routed experts are left out: what proves them is a product of all rows.
"""

from collections.abc import Callable, Collection

import torch

from ria_vllm.format import proofs
from ria_vllm.format.sparse24 import check_bitmask
from ria_vllm.format.weight_scheme import WeightScheme, row_scales

ROWS = 128
SEED = 0


class FileProofs:
    """Makes proofs of the linears and the plain matrices that pass by.

    Args:
        scheme_of: how a linear is stored that is quantized or compressed; None for all others.
        left_out: names of linears of which no proof is made.
        signs_only: see `ria_vllm.format.proofs.vector`.

    Attributes:
        found: matrix -> its proof, float32 [out, 2].
    """

    def __init__(
        self, scheme_of: Callable[[str], WeightScheme | None], left_out: Collection[str] = (), signs_only: bool = False
    ):
        self.scheme_of = scheme_of
        self.left_out = left_out
        self.signs_only = signs_only
        self.found: dict[str, torch.Tensor] = {}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}

    def vector(self, size: int) -> torch.Tensor:
        """r, float32 [size]."""
        return proofs.vector(size, SEED, self.signs_only)

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor, as it is in the file. Those that are damaged are left to the layer that loads them."""
        matrix, _, part = name.rpartition(".")
        if matrix in self.left_out:
            return
        scheme = self.scheme_of(matrix)
        if scheme is None:
            if part == "weight" and tensor.dim() == 2 and tensor.is_floating_point():
                self._keep(matrix, tensor[_rows(len(tensor))], len(tensor))
            return
        wanted = scheme.tensors(torch.float32)
        if part not in wanted:
            return
        parts = self._waiting.setdefault(matrix, {})
        parts[part] = tensor
        if parts.keys() == wanted.keys():
            del self._waiting[matrix]
            weight = parts["weight" if scheme.dense else "bitmask"]
            rows = _rows(len(weight))
            if (sampled := _sampled(parts, scheme, rows)) is not None:
                self._keep(matrix, sampled, len(weight))

    def forget(self) -> None:
        """A load begins, or has failed."""
        self.found, self._waiting = {}, {}

    def take(self) -> dict[str, torch.Tensor]:
        """What has been found since the last time."""
        found = self.found
        self.forget()
        return found

    def _keep(self, matrix: str, weight: torch.Tensor, count: int) -> None:
        """Keep the proof of `weight` [rows, in], the sampled ones of `count` rows."""
        found = torch.full((count, 2), torch.nan, dtype=torch.float32)  # while vLLM loads, the default is another
        found[_rows(count)] = proofs.proof(weight, self.vector(weight.shape[1]))
        self.found[matrix] = found


def _rows(count: int) -> torch.Tensor:
    return torch.arange(0, count, max(1, -(-count // ROWS)))


def _sampled(parts: dict[str, torch.Tensor], scheme: WeightScheme, rows: torch.Tensor) -> torch.Tensor | None:
    """float32 [rows, in]; None if the tensors are not what the scheme says."""
    try:
        whole = [name for name, spec in scheme.tensors(torch.float32).items() if spec.per_tensor]
        cut = {name: tensor.reshape(1) if name in whole else tensor[rows] for name, tensor in parts.items()}
        if scheme.dense:
            return scheme.dense_weight(cut, [len(rows)], torch.float32)
        columns = 8 * cut["bitmask"].shape[1]
        shapes = {name: spec.shape(len(rows), columns) for name, spec in scheme.tensors(torch.float32).items()}
        if any(tuple(cut[name].shape) != shape for name, shape in shapes.items()) or check_bitmask(cut["bitmask"]):
            return None
        if "weight_scale" in cut:
            cut["weight_scale"] = row_scales(cut["weight_scale"], [len(rows)])
        return scheme.format.decode(cut, torch.float32)
    except (IndexError, RuntimeError, ValueError):
        return None

"""Proofs of matrices that have none in their checkpoint, made of their tensors on the way from the files to the model.

compressed-tensors writes no proofs, and ria-vllm none of the transposed down projections of dense experts. To multiply
all of a large model would take minutes. So a proof has `ROWS` rows of each matrix, evenly spread, so that each
tensor-parallel rank has some of them; the others are NaN, which proves nothing.

What comes out of an expert needs all rows of its gate and up. So of these r has a few channels only, others for each
expert, and what is asked of the down projection is some of its rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import lcm

import torch

from ria_vllm.format import proofs
from ria_vllm.format.sparse24 import check_bitmask
from ria_vllm.format.weight_scheme import WeightScheme, row_scales

ROWS = 128
CHANNELS = 128
SEED = 0
PLAIN = WeightScheme(dense=True)


def foreign_vector(size: int, signs_only: bool = False) -> torch.Tensor:
    """r, float32 [size], for checkpoints that have no seed of their own."""
    return proofs.vector(size, SEED, signs_only)


class FileProofs:
    """Makes proofs of the linears and the plain matrices that pass by.

    Args:
        scheme_of: how a linear is stored that is quantized or compressed; None for all others.
        experts: linears of experts -> (gate, up or down; the number of the expert).
        vector: r, float32, of so many channels.
        others: also of what is no expert.

    Attributes:
        found: matrix -> its proof, float32 [out, 2].
        found_of_experts: the same of experts: of the transposed down projection, and of the others, see above.
    """

    def __init__(
        self,
        scheme_of: Callable[[str], WeightScheme | None],
        experts: Mapping[str, tuple[str, int]] | None = None,
        vector: Callable[[int], torch.Tensor] = foreign_vector,
        others: bool = True,
    ):
        self.scheme_of = scheme_of
        self.experts = experts or {}
        self.vector = vector
        self.others = others
        self._clear()

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights, each of which is seen on its way."""
        for name, tensor in weights:
            self.see(name, tensor)
            yield name, tensor

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor, as it is in the file. Those that are damaged are left to the layer that loads them."""
        matrix, _, part = name.rpartition(".")
        expert = self.experts.get(matrix)
        if expert is None and not self.others:
            return
        scheme = self.scheme_of(matrix)
        if scheme is None:
            if part != "weight" or not proofs.is_matrix(tensor.shape) or not tensor.is_floating_point():
                return
            tensor, scheme = tensor.flatten(1), PLAIN
        wanted = scheme.tensors(torch.float32)
        if part not in wanted:
            return
        parts = self._waiting.setdefault(matrix, {})
        parts[part] = tensor
        if parts.keys() == wanted.keys():
            del self._waiting[matrix]
            self._keep(matrix, parts, scheme, expert)

    def _clear(self) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self.found_of_experts: dict[str, torch.Tensor] = {}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}

    def take(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """`found` and `found_of_experts` since the last time."""
        taken = self.found, self.found_of_experts
        self._clear()
        return taken

    def _keep(
        self, matrix: str, parts: dict[str, torch.Tensor], scheme: WeightScheme, expert: tuple[str, int] | None
    ) -> None:
        """Keep the proof of a matrix whose tensors are all here."""
        part = "weight" if scheme.dense else "bitmask"
        rows = len(parts[part])
        columns = parts[part].shape[-1] * (scheme.tensors(torch.float32)[part].part.channels or 1)
        if expert is None or expert[0] == "down":
            here, sampled = rows_of(rows), _sampled(parts, scheme, rows_of(rows), slice(0, columns))
        else:
            here = channels_of(expert[1], columns, scheme)
            sampled = _sampled(parts, scheme, torch.arange(rows), here)
        if sampled is None:
            return
        if expert is None:
            found = torch.full((rows, 2), torch.nan, dtype=torch.float32)  # while vLLM loads, the default is another
            found[here] = proofs.proof(sampled, self.vector(columns))
            self.found[matrix] = found
        elif expert[0] == "down":
            self.found_of_experts[matrix + proofs.TRANSPOSED] = proofs.proof(sampled.T, self.vector(rows)[here])
        else:
            self.found_of_experts[matrix] = proofs.proof(sampled, self.vector(columns)[here])


def rows_of(count: int) -> torch.Tensor:
    """int64: the rows that have a proof, of so many."""
    return torch.arange(0, count, max(1, -(-count // ROWS)))


def channels_of(expert: int, count: int, scheme: WeightScheme) -> slice:
    """The channels that an expert's gate and up have a proof of, of so many."""
    width = min(lcm(CHANNELS, scheme.column_multiple), count)
    start = width * (expert % max(1, count // max(1, width)))
    return slice(start, start + width)


def _sampled(
    parts: dict[str, torch.Tensor], scheme: WeightScheme, rows: torch.Tensor, columns: slice
) -> torch.Tensor | None:
    """float32 [rows, columns]; None if the tensors are not what the scheme says."""
    try:
        cut = {}
        for name, spec in scheme.tensors(torch.float32).items():
            here = (
                slice(None)
                if (each := spec.part.channels) is None
                else slice(columns.start // each, columns.stop // each)
            )
            cut[name] = parts[name].reshape(1) if spec.per_tensor else parts[name][:, here][rows]
        if scheme.dense:
            return scheme.dense_weight(cut, [len(rows)], torch.float32)
        width = columns.stop - columns.start
        shapes = {name: spec.shape(len(rows), width) for name, spec in scheme.tensors(torch.float32).items()}
        if any(tuple(cut[name].shape) != shape for name, shape in shapes.items()):
            return None
        if check_bitmask(cut["bitmask"], pattern=scheme.pattern):
            return None
        if "weight_scale" in cut:
            cut["weight_scale"] = row_scales(cut["weight_scale"], [len(rows)])
        return scheme.format.decode(cut, torch.float32)
    except (IndexError, RuntimeError, ValueError):
        return None

"""Block reconstruction of a layer's routed experts: towards their joint output, with one of them in memory at a time.

This is block coordinate descent on the output of the mixture, the sum of its experts' outputs weighted by the router.
Each expert in turn is trained towards the dense model's mixture output, on its own path, minus what the other experts
contribute now: those before it as they were pruned, those after it still dense. So an expert also makes up for the
errors of those before it, for what the router chose otherwise, and for the drift of what they all read.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ria_vllm import permutation
from ria_vllm.formats import IntFormat
from ria_vllm.offline.calibration.routing import Reads, RoutedTokens
from ria_vllm.offline.model.experts import DOWN
from ria_vllm.offline.model.run_experts import Weights, inner, output, output_of
from ria_vllm.offline.pruned import Pruned
from ria_vllm.offline.pruning.block import Grid, train_block
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.train import after_training
from ria_vllm.progress import Monitor
from ria_vllm.writer import disk_errors

# A token's error counts relative to the squared norm of the mixture's output for it, but to no less than this share of
# the median over its chunk: for a token to which the experts add next to nothing, rounding errors would be learned.
SMALLEST = 0.01


class MixtureTrainer:
    """Trains the experts of one module, and keeps what their output lacks.

    Args:
        experts: the module.
        dense: the weights of its experts, on the device in the dtype of the computations.
        tokens: that they read, all of which are followed in the dense model, or none.
        place: a linear's name relative to the layer -> what an error about it begins with.
        folder: for what is lacking, which takes the space of one stream in float32; None: it stays in memory.
        monitor: of the progress while that is computed.
    """

    def __init__(
        self,
        experts: nn.Module,
        dense: Weights,
        tokens: RoutedTokens,
        recipe: Recipe,
        ranks: Ranks,
        device: torch.device,
        place: Callable[[str], str],
        folder: Path | None,
        monitor: Monitor,
    ):
        self.experts, self.dense, self.tokens, self.recipe = experts, dense, tokens, recipe
        self.ranks, self.device, self.place = ranks, device, place
        sizes = [tokens.pruned.inputs[index].shape for index in range(len(tokens.pruned))]
        # The dense model's output less the own one, [tokens, width] for each of this rank's chunks.
        self.lacking = [_zeros(size, folder and folder / str(index)) for index, size in enumerate(sizes)]
        in_dense = tokens.pruned if tokens.dense is None else tokens.dense
        numbers, what = range(experts.layout.num_experts), "what experts should output"
        for expert in monitor.steps(numbers, what, len(numbers)):
            self._add(in_dense, expert, dense(expert), 1)
        self.norms = [_norms(wanted) for wanted in self.lacking]  # [tokens] each
        for expert in monitor.steps(numbers, what, len(numbers)):
            self._add(tokens.pruned, expert, dense(expert), -1)

    def account(self, expert: int, pruned: Mapping[str, torch.Tensor]) -> None:
        """From now on, an expert has these weights [out, in], by kind, in the dtype that they are stored in."""
        dense = self.dense(expert)
        self._add(self.tokens.pruned, expert, dense, 1)
        pruned = {kind: weight.to(self.device, dense[kind].dtype) for kind, weight in pruned.items()}
        self._add(self.tokens.pruned, expert, pruned, -1)

    def _add(self, reads: Reads, expert: int, weights: Mapping[str, torch.Tensor], sign: int) -> None:
        """Add what an expert contributes to the output, or subtract it."""
        with torch.no_grad():
            for index, lacking in enumerate(self.lacking):
                own, shares = _shares(reads, index, expert)
                (rows,) = torch.where(own)
                if len(rows):
                    X = reads.inputs[index].to(self.device, torch.float32)
                    output = output_of(self.experts, expert, X, rows.to(self.device), weights).cpu()
                    lacking[rows] += output * (sign * shares[rows, None])

    def train(self, expert: int, found: Mapping[str, Pruned], dense: Mapping[str, torch.Tensor]) -> dict[str, Pruned]:
        """Train the kept weights of one expert. All ranks do the same.

        Args:
            found: name relative to the layer -> its pruned linear.
            dense: its dense weights by kind.

        Returns:
            The same linears, see `after_training`.
        """
        layout, recipe = self.experts.layout, self.recipe
        names = {kind: layout.linear(expert, kind) for kind in layout.kinds}
        # Copies, to go back.
        params = {
            kind: nn.Parameter(found[name].weight.to(self.device, torch.float32, copy=True))
            for kind, name in names.items()
        }
        own = self.tokens.chunks(expert)
        places = [(rank, index) for rank in range(self.ranks.size) for index in self.ranks.broadcast(own, rank)]

        def forward(X: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self._output(expert, X, params) * scale[:, None]

        with torch.enable_grad():
            losses = train_block(
                forward,
                params,
                {kind: found[name].mask.to(self.device) for kind, name in names.items()},
                _Made(places, self.ranks, self.device, lambda index: self._input(index, expert)),
                _Made(places, self.ranks, self.device, lambda index: self._target(index, expert, dense)),
                passes=recipe.training_passes(len(places)),
                seed=recipe.seed,
                dtype=recipe.matmul_dtype,
                place=f"{self.place(names[DOWN])} and what is trained with it: ",
                grids=grids_of({kind: found[name] for kind, name in names.items()}, recipe, self.device),
                relative=False,
                agreed=self.ranks.broadcast,
            )
        return {
            name: after_training(found[name], params[kind].data, losses, recipe, self.ranks)
            for kind, name in names.items()
        }

    def _input(self, index: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the expert reads in a chunk [tokens, width], and the factor of its output for each token."""
        chosen, _, scale = self._read(index, expert)
        return self.tokens.pruned.inputs[index][chosen].float(), scale

    def _target(self, index: int, expert: int, dense: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the expert's output for these tokens should be, times the same factor."""
        chosen, own, scale = self._read(index, expert)
        X, in_dense = self.tokens.chunk(index, expert)
        if in_dense is not None:  # nothing says what is lacking for tokens that the expert only leans on
            X = torch.where(own[:, None], X, in_dense)
        lacking = own[:, None] * self.lacking[index][chosen] / self.norms[index][chosen, None]
        with torch.no_grad():
            return self._output(expert, X.to(self.device), dense).cpu() * scale[:, None] + lacking

    def _read(self, index: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which tokens of a chunk the expert reads; of those, which go to it, and the factor of its output."""
        chosen, (own, shares) = self.tokens.chosen(index, expert), _shares(self.tokens.pruned, index, expert)
        # A token that the expert takes though it went to others counts as if it had been sent here, too.
        shares = torch.where(own, shares, self.tokens.pruned.shares[index].mean(1)) / self.norms[index]
        return chosen, own[chosen], shares[chosen]

    def _output(self, expert: int, X: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return output(self.experts, expert, inner(self.experts, expert, X, weights), weights)


def grids_of(pruned: Mapping[str, Pruned], recipe: Recipe, device: torch.device) -> dict[str, Grid]:
    """The grids on which the linears are trained: their scales stay as they are. Empty if weights are not integers."""
    weight_format, grids = recipe.weight_format, {}
    if isinstance(weight_format, IntFormat):
        for name, linear in pruned.items():
            assert linear.scale is not None
            width = linear.weight.shape[1]
            groups = torch.arange(width) // (weight_format.group_size or width)  # of the stored columns
            groups = groups if linear.p is None else groups[permutation.invert(linear.p)]
            low, high = weight_format.smallest, weight_format.largest
            grids[name] = Grid(linear.scale.to(device), groups.to(device), low, high)
    return grids


def _shares(reads: Reads, index: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of a chunk go to an expert, and with which weight; 0 for the others."""
    chosen = reads.choices[index] == expert
    return chosen.any(1), (reads.shares[index] * chosen).sum(1)


def _norms(wanted: torch.Tensor) -> torch.Tensor:
    """The norm by which each token's error is divided."""
    squares = wanted.square().sum(1)
    return squares.clamp(min=max(SMALLEST * float(squares.median()), 1e-12)).sqrt()


T = TypeVar("T", torch.Tensor, tuple[torch.Tensor, torch.Tensor])


@dataclass(frozen=True)
class _Made(Sequence[T]):
    """What `make` makes of each chunk, when it is asked for: no more than one is in memory.

    All ranks have to ask for the same one at the same time: the rank that holds the chunk broadcasts it.

    places: (rank, number among its chunks) of each.
    """

    places: Sequence[tuple[int, int]]
    ranks: Ranks
    device: torch.device
    make: Callable[[int], T]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> T:  # type: ignore[override]
        owner, index = self.places[number]
        made: T = self.ranks.broadcast(self.make(index) if owner == self.ranks.rank else None, owner)
        return made.to(self.device) if isinstance(made, torch.Tensor) else tuple(part.to(self.device) for part in made)


def _zeros(size: torch.Size, file: Path | None) -> torch.Tensor:
    """Zeros in float32; in a file, if one is given: then memory holds only the rows that were used last."""
    if file is None:
        return torch.zeros(size)
    with disk_errors(file), open(file, "wb") as opened:
        # The whole space now, with an error if there is too little: a write to a mapping could only crash.
        os.posix_fallocate(opened.fileno(), 0, 4 * size.numel())
    return torch.from_file(str(file), shared=True, size=size.numel(), dtype=torch.float32).view(size)

"""Block reconstruction of a layer's routed experts: towards their joint output, with one of them in memory at a time.

This is block coordinate descent on the output of the MoE layer, the sum of its experts' outputs weighted by the router.
Each expert in turn is trained towards the dense model's output, on its own path, minus what the other experts
contribute now: those before it as they were pruned, those after it still dense. So an expert also makes up for the
errors of those before it, for what the router chose otherwise, and for the drift of what they all read.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ria_vllm.format import permutation
from ria_vllm.format.formats import RoundedFormat
from ria_vllm.hf.experts_layout import DOWN
from ria_vllm.offline.calibration.activations import Activations, OnDemand
from ria_vllm.offline.experts.routing import Reads
from ria_vllm.offline.experts.store import RoutedExperts
from ria_vllm.offline.model.experts.run import output, output_of
from ria_vllm.offline.pruning.block import Grid, Training, train_block
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.sublayer.pruned_linear import Pruned
from ria_vllm.offline.sublayer.train import after_training
from ria_vllm.progress import Monitor

# A token's error counts relative to the squared norm of the layer's output for it, but to no less than this share of
# the median over its chunk: for a token to which the experts add next to nothing, rounding errors would be learned.
SMALLEST = 0.01


class ExpertsTrainer:
    """Trains the experts of one layer, and keeps what their output lacks.

    Args:
        experts: all of them still dense. Their tokens are all followed in the dense model, or none.
        lacking: empty; gets the dense model's output less the own one, [tokens, width] for each chunk.
        monitor: of the progress while that is computed.
    """

    def __init__(self, experts: RoutedExperts, lacking: Activations, monitor: Monitor):
        self.experts, self.tokens, self.lacking = experts, experts.tokens, lacking
        pruned, dense = self.tokens.pruned, self.tokens.dense
        for index in range(len(pruned)):
            lacking.append(torch.zeros(pruned.inputs[index].shape))
        numbers, what = range(experts.layout.num_experts), "what experts should output"
        for expert in monitor.steps(numbers, what, len(numbers)):
            self._add(pruned if dense is None else dense, expert, experts.dense(expert), 1)
        # [tokens] each: what each token's error is divided by.
        self.norms = [_norms(lacking[index]) for index in range(len(lacking))]
        for expert in monitor.steps(numbers, what, len(numbers)):
            self._add(pruned, expert, experts.dense(expert), -1)

    def account(self, expert: int, pruned: Mapping[str, torch.Tensor]) -> None:
        """From now on, an expert has these weights [out, in], by kind, in the dtype that they are stored in."""
        dense = self.experts.dense(expert)
        self._add(self.tokens.pruned, expert, dense, 1)
        pruned = {kind: weight.to(self.experts.model.device, dense[kind].dtype) for kind, weight in pruned.items()}
        self._add(self.tokens.pruned, expert, pruned, -1)

    @torch.no_grad()
    def _add(self, reads: Reads, expert: int, weights: Mapping[str, torch.Tensor], sign: int) -> None:
        """Add what an expert contributes to the output, or subtract it."""
        for index in range(len(reads)):
            own, shares = reads.shares_of(index, expert)
            (rows,) = torch.where(own)
            if len(rows):
                X = reads.inputs[index].to(self.experts.model.device, torch.float32)
                added = output_of(self.experts.module, expert, X, rows.to(X.device), weights).cpu()
                self.lacking.add(index, rows, added * (sign * shares[rows, None]))

    def train(self, expert: int, found: Mapping[str, Pruned]) -> dict[str, Pruned]:
        """Train the kept weights of one expert.

        Args:
            found: written name -> its pruned linear.

        Returns:
            The same linears, see `after_training`.
        """
        recipe, device = self.experts.recipe, self.experts.model.device
        names, dense = self.experts.names(expert), self.experts.dense(expert)
        linears = {kind: found[name] for kind, name in names.items()}
        # Copies, to go back.
        params = {
            kind: nn.Parameter(linear.weight.to(device, torch.float32, copy=True)) for kind, linear in linears.items()
        }
        chunks = self.tokens.chunks(expert)

        def forward(X: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return output(self.experts.module, expert, X, params) * scale[:, None]

        with torch.enable_grad():
            losses = train_block(
                forward,
                params,
                lambda kind: linears[kind].mask.to(device),
                OnDemand(chunks, lambda index: self._input(index, expert)),
                OnDemand(chunks, lambda index: self._target(index, expert, dense)),
                Training(
                    passes=recipe.schedule.passes(len(chunks)),
                    seed=recipe.seed,
                    dtype=recipe.matmul_dtype,
                    relative=False,
                    place=f"{self.experts.place(names[DOWN])} and what is trained with it: ",
                ),
                grids_of(linears, recipe, device),
            )
        return {name: after_training(linears[kind], params[kind].data, losses, recipe) for kind, name in names.items()}

    def _input(self, index: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the expert reads in a chunk [tokens, width], and the factor of its output for each token."""
        chosen, _, scale = self._read(index, expert)
        device = self.experts.model.device
        return self.tokens.pruned.inputs[index][chosen].float().to(device), scale.to(device)

    @torch.no_grad()
    def _target(self, index: int, expert: int, dense: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the expert's output for these tokens should be, times the same factor."""
        device, (chosen, own, scale) = self.experts.model.device, self._read(index, expert)
        X, in_dense = self.tokens.chunk(index, expert)
        if in_dense is not None:  # nothing says what is lacking for tokens that the expert only leans on
            X = torch.where(own[:, None], X, in_dense)
        lacking = own[:, None] * self.lacking[index][chosen] / self.norms[index][chosen, None]
        found = output(self.experts.module, expert, X.to(device), dense).cpu() * scale[:, None] + lacking
        return found.to(device)

    def _read(self, index: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which tokens of a chunk the expert reads; of those, which go to it, and the factor of its output."""
        chosen, (own, shares) = self.tokens.chosen(index, expert), self.tokens.pruned.shares_of(index, expert)
        # A token that the expert takes though it went to others counts as if it had been sent here, too.
        shares = torch.where(own, shares, self.tokens.pruned.shares[index].mean(1)) / self.norms[index]
        return chosen, own[chosen], shares[chosen]


def grids_of(pruned: Mapping[str, Pruned], recipe: Recipe, device: torch.device) -> dict[str, Grid]:
    """The grids on which the linears are trained: their scales stay as they are. Empty if weights are not rounded."""
    weight_format, grids = recipe.weight_format, {}
    if isinstance(weight_format, RoundedFormat):
        for name, linear in pruned.items():
            assert linear.scale is not None
            width = linear.weight.shape[1]
            groups = torch.arange(width) // (weight_format.group_size or width)  # of the stored columns
            groups = groups if linear.p is None else groups[permutation.invert(linear.p)]
            grids[name] = Grid(weight_format, linear.scale.to(device), groups.to(device))
    return grids


def _norms(wanted: torch.Tensor) -> torch.Tensor:
    """The norm by which each token's error is divided."""
    squares = wanted.square().sum(1)
    return squares.clamp(min=max(SMALLEST * float(squares.median()), 1e-12)).sqrt()

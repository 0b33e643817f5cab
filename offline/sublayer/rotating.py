"""Rotates the heads of a layer before it is pruned, where its topology says that they can be: masks lose less.

Attention mixes the tokens of v's output, head by head, and never its channels. So an orthogonal matrix on the rows of v
that belong to a key-value head, and its transpose on the columns of o that read this head, change nothing. Which matrix
is best for pruning is learned, after "DenoiseRotator" (arXiv 2505.23049). There, the entropy of the scores falls. Here
it is what the mask loses: the sum of w^2 / [H^-1]_jj over the entries it removes, H the damped Gram matrix of a
linear's input. That is the output error that remains for a removed weight if the others make up for it.
"""

import math
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ria_vllm.format.layer_schema import Fold
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.offline.calibration.statistics import Statistics
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.experiments.migrations import producer_rows
from ria_vllm.offline.model.experiments.rotations import rotated, rotated_parameters
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Group, Topology
from ria_vllm.offline.pruning.masks import kept_of_groups
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.sublayer.smoothing import are_own, set_parameter
from ria_vllm.offline.sublayer.solve import one_thread

# Gradient descent with momentum: in each step, every key-value head turns by as many radians as the rate says (root
# mean square), and the rate falls linearly to zero. In the first ten layers of SmolLM2, 22.1% of the scores are lost
# before, and 15.7% after 32 steps. 64 steps of Adam on Cayley's parametrisation take twice as long and end at 15.8%, 32
# of them at 16.4%.
STEPS = 32
RATE = 0.5
MOMENTUM = 0.5
DAMPING = 0.1
# Rows of o, and columns of v, that a step looks at; all if there are fewer.
SAMPLED = 1024
# Draws of groups by which the result is judged.
JUDGED = 8


class Rotator:
    """The rotations of one loaded layer.

    Args:
        pruned: the layer's linears that will be pruned. What stays dense is not rotated.
        changed: parameter that is not pruned, relative to the layer -> what has to be written instead of the source's;
            added to.

    Attributes:
        rotated: the consumers of folds whose heads were rotated.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        topology: Topology,
        pruned: Collection[str],
        recipe: Recipe,
        changed: MutableMapping[str, torch.Tensor],
    ):
        self.model, self.index, self.recipe, self.changed = model, index, recipe, changed
        self.folds = rotatable(model, index, topology, pruned)
        self.rotated: set[str] = set()
        self._dense: dict[str, torch.Tensor] = {}

    def rotate(self, sublayer_pass: SublayerPass) -> None:
        """Rotate the heads of a sublayer of which nothing is pruned yet."""
        for fold in self.folds:
            if fold.consumer in sublayer_pass.runner.sublayer.linears:
                self._rotate(sublayer_pass, fold)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The layer with its own weights, so that the dense stream does not depend on how others were rounded."""
        layer = self.model.layers[self.index]
        rotated = {name: layer.get_parameter(name).data for name in self._dense}
        for name, tensor in self._dense.items():
            set_parameter(layer, name, tensor)
        try:
            yield
        finally:
            for name, tensor in rotated.items():
                set_parameter(layer, name, tensor)

    def forget(self) -> None:
        """Free the layer's own weights, once the dense stream has gone through them."""
        self._dense.clear()

    def _rotate(self, sublayer_pass: SublayerPass, fold: Fold) -> None:
        groups = [Group((fold.producers[0].name,)), Group((fold.consumer,))]
        statistics = sublayer_pass.statistics(0, groups, with_gram=True, with_drift=False)
        # With more threads, sums are rounded in another way, and learning would go elsewhere.
        with sublayer_pass.monitor.phase("rotations"), one_thread():
            rotations = self._learned(fold, *statistics)
        if rotations is None:
            return
        layer = self.model.layers[self.index]
        for name, tensor in rotated(layer, fold, rotations.to(sublayer_pass.runner.device)).items():
            self._dense.setdefault(name, layer.get_parameter(name).data)
            set_parameter(layer, name, tensor)
        for name in _biases(self.model, self.index, fold):  # stored as they are now
            written = self.model.names.direct[self.model.layer_prefix(self.index) + name]
            stored = layer.get_parameter(name).data.to(self.model.read(written).dtype)
            set_parameter(layer, name, stored)
            self.changed[name] = stored.cpu()
        self.rotated.add(fold.consumer)

    def _learned(self, fold: Fold, of_values: Statistics, of_outputs: Statistics) -> torch.Tensor | None:
        """float64 [kv heads, d, d] on the CPU; None if nothing is gained, or a Gram matrix cannot be inverted."""
        layer = self.model.layers[self.index]
        producer, consumer = layer.get_submodule(fold.producers[0].name), layer.get_submodule(fold.consumer)
        num_heads, num_kv_heads = fold.num_heads or 1, fold.num_kv_heads or 1
        d = consumer.in_features // num_heads
        rows = producer_rows(producer, fold.producers[0]).to(producer.weight.device)
        assert of_values.gram is not None and of_outputs.gram is not None
        try:
            heads = Heads(
                producer.weight.data[rows].float().view(num_kv_heads, d, -1),
                inverse_of(of_values.gram).diagonal().clone(),
                consumer.weight.data.float().T.reshape(num_heads, d, -1),
                blocks_of(inverse_of(of_outputs.gram), d),
            )
        except torch.linalg.LinAlgError:
            return None
        return learned(heads, self.recipe.seed, self.recipe.pattern)


def rotatable(model: StreamedModel, index: int, topology: Topology, pruned: Collection[str]) -> list[Fold]:
    """The folds of a layer whose heads can be rotated: both linears are pruned, and a bias is the layer's own."""
    return [
        fold
        for fold in topology.folds
        if fold.consumer in topology.rotations
        and {fold.producers[0].name, fold.consumer} <= set(pruned)
        and are_own(model, index, _biases(model, index, fold))
    ]


def _biases(model: StreamedModel, index: int, fold: Fold) -> list[str]:
    """The parameters that rotating changes and that are no weights of pruned linears: a bias, if there is one."""
    return [name for name in rotated_parameters(model.layers[index], fold) if name.endswith(".bias")]


@dataclass(frozen=True)
class Heads:
    """The weights on both sides of the heads of attention, and what they read; all float32 on one device.

    values: [kv heads, d, in], the rows of v by key-value head.
    values_cost: [in], the diagonal of the inverse Gram matrix of what v reads.
    outputs: [heads, d, out], the columns of o by head; each key-value head has as many neighbouring heads.
    outputs_cost: [heads, d, d], the diagonal blocks of the inverse Gram matrix of what o reads.
    """

    values: torch.Tensor
    values_cost: torch.Tensor
    outputs: torch.Tensor
    outputs_cost: torch.Tensor

    @property
    def share(self) -> int:
        """How many heads read a key-value head."""
        return len(self.outputs) // len(self.values)

    @property
    def width(self) -> int:
        """What v reads."""
        return self.values.shape[2]

    def rotated(self, rotations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v's rows and o's columns, in the same shapes.

        Args:
            rotations: [kv heads, d, d], orthogonal.
        """
        of_heads = rotations.repeat_interleave(self.share, 0)
        return rotations @ self.values, of_heads @ self.outputs


def inverse_of(gram: SymmetricMatrix) -> torch.Tensor:
    """The inverse of a Gram matrix, damped by a share of its mean diagonal entry; float32 [width, width].

    An input that is always zero has the identity.
    """
    H = gram.dense().float()
    mean = float(H.diagonal().mean())
    H.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(H))


def blocks_of(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """The diagonal blocks [count, size, size] of a matrix [count * size, count * size]."""
    return torch.stack([matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size)])


def learned(heads: Heads, seed: int, pattern: Pattern = TWO_OF_FOUR) -> torch.Tensor | None:
    """The matrix of each key-value head: float64 [kv heads, d, d] on the CPU, orthogonal.

    None if what is learned loses no less than the model's own channels do.
    """
    kv, d = heads.values.shape[:2]
    device = heads.values.device
    draw = torch.Generator().manual_seed(seed)
    identity = torch.eye(d, dtype=torch.float64, device=device).expand(kv, d, d)
    found, speed = identity, torch.zeros_like(identity)
    for step in range(STEPS):
        with torch.enable_grad():
            rotations = found.float().requires_grad_()
            gradient = torch.autograd.grad(_lost(heads, rotations, draw, pattern), rotations)[0].double()
        turn = gradient @ found.mT
        turn = turn - turn.mT  # skew-symmetric: what keeps a rotation a rotation
        speed = MOMENTUM * speed + turn
        ahead = MOMENTUM * speed + turn
        size = torch.linalg.matrix_norm(ahead, keepdim=True) / math.sqrt(d)
        half = RATE / 2 * (1 - step / STEPS) * ahead / size.clamp(min=torch.finfo(torch.float64).tiny)
        found = torch.linalg.solve(identity + half, (identity - half) @ found)
    before, after = (
        sum(float(_lost(heads, one, torch.Generator().manual_seed(seed + 1 + i), pattern)) for i in range(JUDGED))
        for one in (identity.float(), found.float())
    )
    return found.cpu() if after < before else None


def _lost(heads: Heads, rotations: torch.Tensor, draw: torch.Generator, pattern: Pattern) -> torch.Tensor:
    """The share of the scores that the mask loses, of v plus of o, in groups of channels drawn at random."""
    out = heads.outputs.shape[2]
    rows, columns = (_some(count, SAMPLED, draw).to(rotations.device) for count in (out, heads.width))
    # Where all are looked at, the order of the rows does not matter, and that of the columns only to the mask.
    outputs = heads.outputs if len(rows) == out else heads.outputs.index_select(2, rows)
    values, values_cost, of_columns = heads.values, heads.values_cost, columns
    if len(columns) < heads.width:
        values, values_cost = values.index_select(2, columns), values_cost[columns]
        of_columns = torch.arange(len(columns), device=rotations.device)
    values, outputs = replace(heads, values=values, outputs=outputs).rotated(rotations)
    of_heads = rotations.repeat_interleave(heads.share, 0)
    outputs_cost = torch.einsum("hed,hdf,hef->he", of_heads, heads.outputs_cost, of_heads).flatten()
    of_channels = _some(len(outputs_cost), len(outputs_cost), draw).to(rotations.device)
    of_v = _share_lost(values.flatten(0, 1).T.contiguous(), values_cost, of_columns, pattern.of)
    return of_v + _share_lost(outputs.flatten(0, 1), outputs_cost, of_channels, pattern.of)


def _share_lost(weights: torch.Tensor, cost: torch.Tensor, order: torch.Tensor, group: int) -> torch.Tensor:
    """The share of the scores w^2 / cost that the mask loses, in whole groups of neighbours.

    Only the mask needs every score. The sums take those of squares over rows, and then divide by the cost.

    Args:
        weights: [columns, rows]; columns are drawn, and gathering them is faster if each is contiguous.
        cost: [columns].
        order: int64 [columns], the channels in the order in which they are neighbours.
        group: how many neighbours are in a group.
    """
    order = order[: len(order) // group * group]
    squares = weights.square()
    with torch.no_grad():
        groups = (squares / cost[:, None]).index_select(0, order).unflatten(0, (-1, group)).unbind(1)
        kept = torch.stack(kept_of_groups(groups), 1).flatten(0, 1)
        removed = torch.zeros_like(squares).index_copy_(0, order, (~kept).to(squares.dtype))
        counted = torch.zeros_like(cost).index_fill_(0, order, 1.0)
    lost, total = ((of.sum(1) / cost * counted).sum() for of in (squares * removed, squares))
    return lost / total.clamp(min=torch.finfo(torch.float32).tiny)


def _some(count: int, most: int, draw: torch.Generator) -> torch.Tensor:
    """Numbers below `count` in random order, at most `most` of them."""
    return torch.randperm(count, generator=draw)[:most]

"""Rotates the heads of a layer before it is pruned, where its topology says that they can be.

The dense function stays the same: v's rows and o's columns are multiplied by the same orthogonal matrix, one for each
key-value head.
"""

from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager

import torch

from ria_vllm.format.layer_schema import Fold
from ria_vllm.offline.calibration.statistics import Statistics
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.experiments.migrations import producer_rows
from ria_vllm.offline.model.experiments.rotations import rotated, rotated_parameters
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Group, Topology
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.sublayer.smoothing import are_own, set_parameter
from ria_vllm.offline.sublayer.solve import one_thread
from ria_vllm.offline.transforms import rotation


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
        rotations = None
        if sublayer_pass.ranks.first:
            # With more threads, sums are rounded in another way, and learning would go elsewhere.
            with sublayer_pass.monitor.phase("rotations"), one_thread():
                rotations = self._learned(fold, *statistics)
        rotations = sublayer_pass.ranks.broadcast(rotations)
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
            heads = rotation.Heads(
                producer.weight.data[rows].float().view(num_kv_heads, d, -1),
                rotation.inverse_of(of_values.gram).diagonal().clone(),
                consumer.weight.data.float().T.reshape(num_heads, d, -1),
                rotation.blocks_of(rotation.inverse_of(of_outputs.gram), d),
            )
        except torch.linalg.LinAlgError:
            return None
        return rotation.learned(heads, self.recipe.seed, self.recipe.pattern)


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

"""The topologies of all decoder layers of a model: one experiment for each kind of layer."""

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.describe import describe, describe_as_it_is
from ria_vllm.offline.model.embedding import Embedder, LayerCall
from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.model.topology import Topologies, Topology, kinds_of

# Enough for attention and convolutions to mix them.
TOKENS = 8


def survey(model: StreamedModel, embedder: Embedder, tokens: torch.Tensor) -> Topologies:
    """Describe one layer of each kind.

    Args:
        embedder: of the model, which knows what layers return.
        tokens: int64 [1, at least one], any text.

    Raises:
        RiaError: a layer that does not run by itself.
    """
    stream, calls = embedder(tokens[:, :TOKENS])
    kinds = kinds_of(model.layers)
    found, warnings = [], []
    for index in [kinds.index(kind) for kind in range(max(kinds) + 1)]:
        topology, warning = _describe(model, index, calls[index], stream)
        found.append(topology)
        warnings += warning
    return Topologies.of_kinds(found, kinds, warnings)


def _describe(model: StreamedModel, index: int, call: LayerCall, stream: torch.Tensor) -> tuple[Topology, list[str]]:
    try:
        return describe(model.config.get_text_config(), model.layers[index], call, stream), []
    except RiaError as error:
        layer = model.load_layer(index)
        topology = describe_as_it_is(layer, lambda: call(layer, stream))
        model.free_layer(index)
        place = model.layer_prefix(index).removesuffix(".")
        return topology, [f"{place} and its like: pruned without folds, because no experiment is possible: {error}"]

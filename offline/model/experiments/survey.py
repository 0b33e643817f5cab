"""The topologies of all decoder layers of a model: one experiment for each kind of layer."""

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experiments.describe import describe, describe_as_it_is
from ria_vllm.offline.model.experiments.experiment import Batch, weights_of_copy
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.embedding import Embedder
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.run.sharing import with_what_is_left
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Topologies, Topology, kinds_of
from ria_vllm.offline.runtime.memory import available, is_out_of_memory

# Enough for attention and convolutions to mix them.
TOKENS = 8
# Folds are tried once more with so many: attention may do something else beyond a window, a block or a chunk.
MANY_TOKENS = 512


def survey(model: StreamedModel, embedder: Embedder, tokens: torch.Tensor) -> Topologies:
    """Describe one layer of each kind.

    Args:
        embedder: of the model, which knows what layers return.
        tokens: int64 [1, at least one], any text; its first 512 are used.

    Raises:
        RiaError: a layer that does not run by itself.
    """
    texts = [tokens[:, :count] for count in (TOKENS, MANY_TOKENS)]
    batches = [with_what_is_left(model.layers, *embedder(text)) for text in texts]
    kinds = kinds_of(model.layers, [_shared(call) for call in batches[0][1]])
    found, warnings = [], []
    for index in [kinds.index(kind) for kind in range(max(kinds) + 1)]:
        short, long = ((calls[index], stream) for stream, calls in batches)
        topology, warning = _describe(model, index, short, long)
        found.append(topology)
        warnings += warning
    return Topologies.of_kinds(found, kinds, warnings)


def _shared(call: LayerCall) -> tuple[int, int]:
    """How much a layer leaves for later ones, and how much it reads of earlier ones."""
    return len(call.leaves), len(call.entries())


def _describe(model: StreamedModel, index: int, short: Batch, long: Batch) -> tuple[Topology, list[str]]:
    """The topology of a layer; with a warning if it is described without an experiment."""
    try:
        _check_memory(model.layers[index])
        return describe(text_config(model.config), model.layers[index], short, long), []
    except (RiaError, MemoryError, RuntimeError) as error:
        if not isinstance(error, RiaError) and not is_out_of_memory(error):
            raise
        why = str(error) or "there is not enough memory."
    topology = describe_as_it_is(model.load_layer(index), *short)
    model.free_layer(index)
    place = model.layer_prefix(index).removesuffix(".")
    return topology, [f"{place} and its like: pruned without folds, because no experiment is possible: {why}"]


def _check_memory(layer: nn.Module) -> None:
    """Raise MemoryError if the copy in float64 does not fit: the system may end the process instead of refusing."""
    needed, free = 8 * weights_of_copy(layer), available(torch.device("cpu"))
    if free is not None and needed > free:
        raise MemoryError(f"a copy in float64 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")

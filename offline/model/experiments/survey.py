"""The topologies of all decoder layers of a model: one experiment for each kind of layer."""

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experiments.describe import describe
from ria_vllm.offline.model.experiments.experiment import weights_of_copy
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.embedding import Embedder
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.run.sharing import with_what_is_left
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Topologies, kinds_of
from ria_vllm.offline.runtime.memory import available

# Enough for attention and convolutions to mix them.
TOKENS = 8
# Folds are tried once more with so many: attention may do something else beyond a window, a block or a chunk.
MANY_TOKENS = 512
TOO_LARGE = "what this layer looks like is found out on a copy in float64, which does not fit into memory"


def survey(model: StreamedModel, embedder: Embedder, tokens: torch.Tensor, changes: bool = True) -> Topologies:
    """Describe one layer of each kind.

    Args:
        embedder: of the model, which knows what layers return.
        tokens: int64 [1, at least one], any text; its first 512 are used.
        changes: see `describe`.

    Raises:
        RiaError: a layer that does not run by itself, or whose copy in float64 does not fit into memory.
    """
    texts = [tokens[:, :count] for count in (TOKENS, MANY_TOKENS)]
    batches = [with_what_is_left(model.layers, *embedder(text)) for text in texts]
    kinds = kinds_of(model.layers, [_shared(call) for call in batches[0][1]])
    found = []
    for index in [kinds.index(kind) for kind in range(max(kinds) + 1)]:
        layer = model.layers[index]
        place = f"{model.folder}: {model.layer_prefix(index).removesuffix('.')}"
        _check_memory(layer, place)
        short, long = ((calls[index], stream) for stream, calls in batches)
        try:
            found.append(describe(text_config(model.config), layer, short, long, changes))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise RiaError(f"{place}: {TOO_LARGE}. Compress on a machine with more memory.") from error
    return Topologies.of_kinds(found, kinds)


def _shared(call: LayerCall) -> tuple[int, int]:
    """How much a layer leaves for later ones, and how much it reads of earlier ones."""
    return len(call.leaves), len(call.entries())


def _check_memory(layer: nn.Module, place: str) -> None:
    """Refuse a copy in float64 that does not fit: the system would end the process without a word."""
    needed, free = 8 * weights_of_copy(layer), available(torch.device("cpu"))
    if free is not None and needed > free:
        raise RiaError(
            f"{place}: {TOO_LARGE}. It takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Compress on a "
            "machine with more."
        )

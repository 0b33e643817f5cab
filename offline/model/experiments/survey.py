"""The topologies of all decoder layers of a model: one experiment for each kind of layer."""

from collections.abc import Hashable, Sequence

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
from ria_vllm.offline.model.topology import Topologies
from ria_vllm.offline.runtime.memory import available

# Enough for attention and convolutions to mix them.
TOKENS = 8
# Folds are tried once more with so many: attention may do something else beyond a window, a block or a chunk.
MANY_TOKENS = 512
# In the names of what tells a layer where it is.
LAYER_NUMBER = ("layer", "idx", "index")
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


def kinds_of(layers: Sequence[nn.Module], shared: Sequence[Hashable] | None = None) -> tuple[int, ...]:
    """A number for the kind of each layer.

    Layers are of one kind if they have the same modules, with the same switches, and parameters of the same shapes.

    Args:
        shared: what must be the same in layers of one kind, too: what each of them leaves for others, and reads.
    """
    known: dict[tuple, int] = {}
    also = shared or [None] * len(layers)
    signatures = [(_signature(layer), own) for layer, own in zip(layers, also, strict=True)]
    return tuple(known.setdefault(signature, len(known)) for signature in signatures)


def _signature(layer: nn.Module) -> tuple:
    modules = tuple((name, type(module), _switches(module)) for name, module in layer.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _switches(module: nn.Module) -> frozenset[tuple[str, str]]:
    """What a module does or does not do, such as reading another layer's keys and values, its counts of heads, and
    limits."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return frozenset(
        (name, repr(value))
        for name, value in own.items()
        if isinstance(value, (bool, str))
        or value is None
        or (isinstance(value, (int, float)) and not any(part in name for part in LAYER_NUMBER))
    )


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

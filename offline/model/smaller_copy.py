"""What is found out about a smaller copy of a decoder layer, and then said about the layer itself."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.architecture import outside_decoder, text_config
from ria_vllm.offline.model.buffers import compute_buffers
from ria_vllm.offline.model.describe import describe
from ria_vllm.offline.model.embedding import Embedder
from ria_vllm.offline.model.experiment import Batch, Experiment, light_weights
from ria_vllm.offline.model.folds import hold_together
from ria_vllm.offline.model.rotations import turns
from ria_vllm.offline.model.sharing import with_what_is_left
from ria_vllm.offline.model.shrink import smaller_configs
from ria_vllm.offline.model.topology import Topology
from ria_vllm.offline.model.transfer import Sized, transferred
from ria_vllm.offline.runtime.memory import available, is_out_of_memory

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Whole:
    """A model whose layers are on the meta device.

    Args:
        decoder, base, layers: the paths of the text decoder, of the model without its head, and of the layers.
        folder: for errors.
    """

    model: PreTrainedModel
    decoder: str
    base: str
    layers: str
    folder: Path


def describe_smaller(
    whole: Whole, embedder: Embedder, index: int, texts: Sequence[torch.Tensor], short: Batch, enough: int | None = None
) -> Topology | None:
    """The topology of layer `index`, found in the first smaller copy of it that can be run.

    Args:
        texts: int64 [1, tokens], few tokens and many.
        short: how the model calls the layer for the first of them, and a stream of the layer's own width.
        enough: see `smaller_configs`.

    Returns:
        None if there is no such copy, or what it says does not hold for the layer.
    """
    config, layer = text_config(whole.model.config), whole.model.get_submodule(whole.layers)[index]
    limit = {} if enough is None else {"enough": enough}
    for smaller in smaller_configs(config, layer, index, **limit):
        try:
            small = _smaller(whole, smaller)
            batches = _batches(small, embedder, index, texts)
            copied = small.model.get_submodule(small.layers)[index]
            sized = Sized(copied, text_config(small.model.config))
            found = describe(sized.config, copied, *batches)
        except Exception:  # whatever code of transformers says against such widths
            continue
        try:
            topology = transferred(found, sized, Sized(layer, config), short[1].shape[-1])
        except RiaError:
            continue
        return _checked(topology, layer, short)
    return None


def _smaller(whole: Whole, config: PretrainedConfig) -> Whole:
    """The whole model with another configuration of its text decoder, with numbers outside of its layers."""
    model = whole.model
    old = text_config(model.config)
    with torch.device("meta"):
        made = type(model)._from_config(
            copy.deepcopy(model.config, {id(old): config}),
            dtype=torch.float32,
            attn_implementation=old._attn_implementation,
        )
    made.eval().requires_grad_(False)
    outside = {name for name, _ in outside_decoder(made, whole.decoder)}
    names = [name for name, _ in made.named_non_persistent_buffers() if name.rpartition(".")[0] not in outside]
    compute_buffers(made, names, CPU, True, whole.folder)
    small = replace(whole, model=made)
    _materialize(small)
    return small


def _materialize(small: Whole) -> None:
    """Give what is called before the layers some numbers."""
    decoder, layers = _prefix(small.decoder), f"{small.layers}."
    first = _prefix(small.base) + next(name for name, _ in small.model.get_submodule(small.base).named_parameters())
    for path, module in small.model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                full = _prefix(path) + name
                inside = full.startswith(decoder) and not full.startswith(layers)
                # Wrappers take the device and dtype of the first for their own.
                if tensor is not None and tensor.is_meta and (inside or full == first):
                    # Embeddings are large, so matrices are one number.
                    shape = () if tensor.dim() > 1 and own is module._parameters else tensor.shape
                    ones = torch.ones(shape, dtype=tensor.dtype).expand(tensor.shape)
                    own[name] = nn.Parameter(ones, requires_grad=False) if own is module._parameters else ones


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def _batches(small: Whole, embedder: Embedder, index: int, texts: Sequence[torch.Tensor]) -> Iterator[Batch]:
    base, layers = small.model.get_submodule(small.base), small.model.get_submodule(small.layers)
    for tokens in texts:
        with torch.no_grad():
            stream, calls = with_what_is_left(layers, *embedder.calls(base, layers, tokens.to(CPU)))
        yield calls[index], stream


def _checked(topology: Topology, layer: nn.Module, short: Batch) -> Topology | None:
    """The same, after a try of all folds on the layer's own widths, if there is memory for it; without the rotations
    that do not hold there."""
    needed, free = torch.float32.itemsize * light_weights(layer), available(CPU)
    if not topology.folds or (free is not None and needed > free):
        return replace(topology, found_on="a smaller copy")
    try:
        experiment = Experiment(layer, *short, light=True)
        held = hold_together(experiment, topology.folds)
        turned = [fold for fold in topology.folds if held and fold.consumer in topology.rotations]
        rotations = tuple(fold.consumer for fold in turned if turns(experiment, fold))
    except RiaError:
        held = False
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return replace(topology, found_on="a smaller copy")
    found_on = "a smaller copy, then tried on the layer's own widths"
    return replace(topology, rotations=rotations, found_on=found_on) if held else None

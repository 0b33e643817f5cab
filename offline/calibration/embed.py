"""Starts a calibration run: embeds the tokens and finds out how the model's layers look and how it calls them.

The forward pass of one batch is in `ria_vllm.offline.model.run.embedding`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.arguments import AllArguments, OfChunks
from ria_vllm.offline.model.experiments.survey import survey
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.embedding import Embedder
from ria_vllm.offline.model.run.sharing import Sharing, find_sharing
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Topologies
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor


@dataclass(frozen=True)
class Embedded:
    """What a pass over the layers starts from.

    streams: those into layer 0; topologies: of the decoder layers; arguments: what layers read besides the stream.
    held_out: the tokens of the streams' held-out chunks.
    """

    streams: Streams
    topologies: Topologies
    arguments: AllArguments
    held_out: Sequence[torch.Tensor]


def embed(
    model: StreamedModel,
    recipe: Recipe,
    tokens: torch.Tensor,
    monitor: Monitor,
    topologies: Topologies | None = None,
    held_out: int = 0,
) -> Embedded:
    """Embed the calibration tokens.

    Args:
        recipe: it says how many tokens are in one forward pass of a layer, one sample at least, and whether the dense
            model is followed on its own path.
        tokens: int64 [samples, seq_len].
        topologies: found by the interrupted run that is resumed; None: they are found now.
        held_out: to so many of the samples, the last ones, nothing is to be fitted.

    Raises:
        RiaError: a model whose layers cannot be run one by one.
    """
    in_chunk = max(1, recipe.chunk_tokens // tokens.shape[1])
    fitted = len(tokens) - held_out
    in_held_out = in_chunk if recipe.budget is None else 1  # of which a budget measures most on a few
    chunks, others = tokens[:fitted].split(in_chunk), tokens[fitted:].split(in_held_out) if held_out else ()
    # The stream of a bf16 model holds no more than bf16 can, and takes half as much space in it.
    stored_dtype = torch.bfloat16 if model.stored_dtype == torch.bfloat16 else model.dtype
    pruned, dense = (Activations(model.dtype, stored_dtype) for _ in range(2))
    streams = Streams(pruned, dense if recipe.follows_dense else None, len(others))
    with monitor.phase("embedding"):
        embedder = Embedder(model)
        embedder.learn_form(chunks[0][:1])
        embedder.learn_varying(chunks[0][:1], _another(chunks))
        # The last chunks may be shorter, and layers are called otherwise for them.
        ends = [*chunks[:1], *chunks[-1:], *others[:1], *others[-1:]]
        known = {stream.shape: (calls, stream) for stream, calls in map(embedder, ends)}
        first, stream = next(iter(known.values()))
        calls = {shape: calls for shape, (calls, _) in known.items()}
        sharing = find_sharing(model.layers, first, stream)
        _check_shared(model, sharing)
        left = {is_dense: OfChunks(stored_dtype) for is_dense in (False, True)}
        arguments = AllArguments(calls, OfChunks(stored_dtype), sharing, left)
        del known, stream
        if topologies is None:
            with monitor.phase("structure of the layers"):
                changes = bool(recipe.migration_strength or recipe.rotates_heads)
                topologies = survey(model, embedder, chunks[0][:1], changes)
        texts = [*chunks, *others]
        for number, text in enumerate(monitor.steps(texts, "embedding", len(texts))):
            stream, found = embedder(text)
            for index, (call, other) in enumerate(zip(calls[stream.shape], found, strict=True)):
                if set(call.differences(other)) - call.varying:
                    raise RiaError(
                        f"{model.folder}: {type(model.model).__name__} passes its layers inputs besides the residual "
                        "stream that differ between texts, so they cannot be pruned one by one."
                    )
                arguments.made.put(number, {key: other[key[1]] for key in arguments.made_for(index)})
            streams.append(stream)
        embedder.close()
    return Embedded(streams, topologies, arguments, others)


def _check_shared(model: StreamedModel, sharing: Sharing) -> None:
    """Refuse a model whose layers read each other's keys and values in another way than through a mapping."""
    count = getattr(text_config(model.config), "num_kv_shared_layers", None) or 0
    found = sum(map(bool, sharing.read))
    if found < count:
        raise RiaError(
            f"{model.folder}: {type(model.model).__name__}: config.json says that its last {count} layers read the "
            f"keys and values of earlier ones (num_kv_shared_layers), but {found} were seen to do so, so its layers "
            "cannot be pruned one by one. Another version of transformers may pass them on in a way that is understood."
        )


def _another(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """A text [1, tokens] as long as the first one, with other tokens, unless all have the same ones."""
    first = chunks[0][:1]
    others = (text[None] for chunk in chunks for text in chunk)
    return next((text for text in (first.flip(1), *others) if not torch.equal(text, first)), first)

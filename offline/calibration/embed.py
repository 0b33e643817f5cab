"""Starts a calibration run: embeds the tokens and finds out how the model's layers look and how it calls them.

The forward pass of one batch is in `ria_vllm.offline.model.embedding`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.model.embedding import Embedder, LayerCall
from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.model.survey import survey
from ria_vllm.offline.model.topology import Topologies
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor

# Tokens in one forward pass of a layer. Chunks do not depend on the number of ranks, so neither do results.
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Embedded:
    """What a pass over the layers starts from.

    streams: those into layer 0; topologies: of the decoder layers; calls: of each layer, by the shape of the stream.
    """

    streams: Streams
    topologies: Topologies
    calls: Mapping[torch.Size, list[LayerCall]]

    def calls_of(self, layer: int) -> dict[torch.Size, LayerCall]:
        """How the model calls one layer, by the shape of the stream."""
        return {shape: calls[layer] for shape, calls in self.calls.items()}


def embed(
    model: StreamedModel,
    tokens: torch.Tensor,
    cache: Path | None,
    follow_dense: bool,
    ranks: Ranks,
    monitor: Monitor,
    topologies: Topologies | None = None,
) -> Embedded:
    """Embed this rank's share of the calibration tokens.

    Args:
        tokens: int64 [samples, seq_len], the same on all ranks.
        cache: a folder for activations; None: they stay in memory.
        follow_dense: also keep a stream for the dense model on its own path.
        topologies: found in an earlier pass; None: they are found now.

    Raises:
        RiaError: fewer chunks than ranks, or a model whose layers cannot be run one by one.
    """
    chunks = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
    if len(chunks) < ranks.size:
        raise RiaError(
            f"{len(tokens)} samples of {tokens.shape[1]} tokens make only {len(chunks)} chunks, too few for "
            f"{ranks.size} processes. Use fewer processes, or more samples."
        )
    # The stream of a bf16 model holds no more than bf16 can, and takes half as much space in it.
    stored_dtype = torch.bfloat16 if model.stored_dtype == torch.bfloat16 else model.dtype

    def empty(name: str) -> Activations:
        folder = None if cache is None else cache / f"{name}-{ranks.rank}"
        return Activations(folder, model.dtype, stored_dtype)

    streams = Streams(empty("pruned"), empty("dense") if follow_dense else None, len(chunks))
    with monitor.phase("embedding"):
        embedder = Embedder(model)
        embedder.learn_form(chunks[0][:1])
        # By one rank, because each copy of a layer in float64 takes as much memory as four layers.
        if topologies is None:
            topologies = ranks.broadcast(survey(model, embedder, chunks[0][:1]) if ranks.first else None)
        # The last chunk may be shorter; every rank has to know how layers are called for it.
        known = {stream.shape: calls for stream, calls in map(embedder, (chunks[0], chunks[-1]))}
        share = ranks.share(len(chunks))
        for index in monitor.steps(share, "embedding", len(share)):
            stream, calls = embedder(chunks[index])
            if not all(one.same_as(other) for one, other in zip(known[stream.shape], calls, strict=True)):
                raise RiaError(
                    f"{model.folder}: {type(model.model).__name__} passes its layers inputs besides the residual "
                    "stream that differ between texts, so they cannot be pruned one by one."
                )
            streams.append(stream)
        embedder.close()
    return Embedded(streams, topologies, known)

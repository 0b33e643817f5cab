"""How much a compression loses, on the samples to which nothing was fitted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ria_vllm.offline.calibration.activations import Streams
from ria_vllm.offline.model.run.architecture import output_head
from ria_vllm.offline.model.run.embedding import Embedder
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor

# Logits that are in memory at a time, a few times over.
PIECE = 1 << 22
# In dense perplexities: up to the first, little is lost; beyond the second, more than most tasks forgive.
NEAR, FAR = 1.05, 1.5


def held_out_loss(
    model: StreamedModel, streams: Streams, tokens: Sequence[torch.Tensor], monitor: Monitor
) -> dict[str, Any] | None:
    """Perplexities of both models, and the divergence KL(dense || pruned) of a token, in nats.

    Args:
        streams: behind the last layer.
        tokens: those of the held-out chunks, [samples, tokens] each.

    Returns:
        For the report; None if the model predicts no tokens, or its head does not run by itself.
    """
    if streams.dense is None or output_head(model.model) is None:
        return None
    total = torch.zeros(4, dtype=torch.float64)  # negative log-likelihoods, dense and pruned; divergence; tokens
    with monitor.phase("held-out samples"):
        try:
            embedder = Embedder(model)
            if tokens:
                embedder.learn_form(tokens[0][:1])
            for index, chunk in zip(streams.measured, tokens, strict=True):
                for sample in range(len(chunk)):
                    # Gemma 3n's streams have four states for each token, before the samples.
                    both = (stream[index].narrow(-3, sample, 1) for stream in (streams.dense, streams.pruned))
                    total += _of_sample(embedder, chunk[sample], *both)
        except Exception as error:  # whatever it is, hours of work are done, and do not depend on it
            failed = str(error) or type(error).__name__
        else:
            failed = "" if bool(total.isfinite().all()) else "predictions that are not finite"
        finally:
            model.free_base()
    if failed:
        monitor.warn(f"how much is lost could not be measured: {failed}")
        return None
    dense, pruned, divergence, count = total.tolist()
    return {
        "tokens": round(count),
        "perplexity": round(math.exp(min(pruned / count, 700)), 4),
        "perplexity_dense": round(math.exp(min(dense / count, 700)), 4),
        "kl": round(divergence / count, 6),
    }


def _of_sample(embedder: Embedder, tokens: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """What one sample [tokens] adds to the sums; the streams are [..., 1, tokens, hidden]."""
    found = torch.zeros(4, dtype=torch.float64)
    device, count = embedder.model.device, max(1, PIECE // embedder.model.vocabulary)
    for first in range(0, len(tokens) - 1, count):
        piece = slice(first, min(first + count, len(tokens) - 1))
        following = tokens[piece.start + 1 : piece.stop + 1, None].to(device)
        p, q = (
            embedder.logits(tokens[None, piece], stream[..., piece, :].to(device))[0].float().log_softmax(-1)
            for stream in (dense, pruned)
        )
        divergence = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        likelihoods = [-one.gather(1, following).sum() for one in (p, q)]
        found += torch.tensor([*map(float, (*likelihoods, divergence)), len(following)], dtype=torch.float64)
    return found


def verdict(found: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """What `compress` says of it at the end: what was measured, and what to think of that."""
    source = "the calibration text" if recipe.eval_text is None else Path(recipe.eval_text).name
    chose = "what is pruned" if recipe.budget is not None else ""
    if recipe.eval_text is not None and recipe.trains:
        chose = f"{chose}{' and ' if chose else ''}whose training is kept"
    text = (
        f"on {found['tokens']} tokens of {source} to which nothing was fitted"
        f"{f', but that chose {chose}' if chose else ''}: perplexity "
        f"{found['perplexity']:.2f}, dense {found['perplexity_dense']:.2f}; KL {found['kl']:.3f}"
    )
    if unrounded := not_rounded(recipe):
        text += f", {unrounded}"
    longer = recipe.reconstruct != "block" and not recipe.only_keeps
    way = "`--effort best`" if longer else "`ria-vllm distill`"
    return {"quality": text, "advice": advice(found, way)}


def advice(found: dict[str, Any], way: str) -> str:
    """What to think of these perplexities, `perplexity` and `perplexity_dense`.

    Args:
        way: what would make the first one better.
    """
    ratio = found["perplexity"] / found["perplexity_dense"]
    if ratio <= NEAR:
        return "That is near the dense model."
    closer = f"{way} would bring it closer."
    return closer if ratio <= FAR else f"Much is lost: {closer} Dense W8A8 loses next to nothing."


def not_rounded(recipe: Recipe) -> str:
    """What the measured model is spared that the folder's is not; empty if nothing."""
    what = []
    if recipe.max_loss is None:
        what += ["weights"] * recipe.continues_exactly + ["inputs"] * (recipe.activations != "none")
    what += ["embeddings", "the head"] if recipe.has_integers else []
    return f"before {', '.join(what[:-1])}{' and ' if what[1:] else ''}{what[-1]} were rounded" if what else ""

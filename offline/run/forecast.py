"""What a compression takes, estimated from the shapes of the linears and from what this machine does in a second."""

import time
from collections.abc import Callable, Iterator
from functools import cache
from math import prod, sqrt

import torch

from ria_vllm.format.pattern import TWO_OF_FOUR
from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.experts.plan import experts_to_prune
from ria_vllm.offline.model.run.architecture import output_head, text_config
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import RECONSTRUCTIONS, Recipe
from ria_vllm.offline.run.heads import embeddings_in_int8
from ria_vllm.offline.run.plan import Plan, linears_to_prune
from ria_vllm.speed import Sizes

# Fitted to the phases of SmolLM2-135M on a Xeon with AMX (docs/lab/figures.md). A linear [out, in] takes multiply-adds
# in the dtype of the layers, in float32, and bytes of memory: for each token and weight, square of `in`, and channel
PASSED, GRAMS, TOUCHED, AROUND = 5, 1.7, 40, 1024
# for each weight times `in` (permutations, and ADMM), and each weight
ORDERED, SOLVED, SEARCHED = 20, 22, 30_000
# and in training for each token and weight, channel, and for each weight in a step.
TRAINED, FELT, STEPPED = 3, 23, 300
# Tokens that `--effort best` distils on, and how many of them the dense model writes beside a text; for each of them,
# multiply-adds a weight, and bytes a channel of the linears.
DISTILLED, OWN, TAUGHT, RETURNED = 262_144, 0.5, 5, 170
# Those bytes for a token that the dense model writes, and those for each token that it may choose.
WRITTEN, CHOSEN = 80, 330
# Bytes of the process before it has loaded anything; layers in memory at the peak, in bfloat16 and float32.
LIBRARIES, LAYERS, WIDE_LAYERS = 700e6, 6.75, 8.5


def pruning_seconds(model: StreamedModel, recipe: Recipe, layers: range | None = None) -> float:
    """What `compress` takes on the model's device where it reads text, but for text that the model writes.

    Args:
        layers: only these; None: all.
    """
    tokens, trained = recipe.drawn * recipe.seq_len, RECONSTRUCTIONS[recipe.reconstruct]
    trained = max(trained, 2 * recipe.samples * recipe.seq_len) if trained else 0  # it passes twice at least
    fast = exact = grams = memory = 0.0
    for rows, columns, copies, share in _shapes(model, recipe, layers):
        weights, reached, taught = rows * columns, copies * share, trained * (copies == 1)
        fast += weights * (reached * (PASSED * tokens + TRAINED * taught) + copies * ORDERED * columns)
        grams += recipe.needs_gram * GRAMS * tokens * reached * columns**2
        exact += recipe.needs_gram * copies * SOLVED * weights * columns
        around = 1 + recipe.seq_len / AROUND  # attention
        memory += 4 * (rows + columns) * reached * around * (TOUCHED * tokens + FELT * taught)
        searched = SEARCHED if recipe.pattern == TWO_OF_FOUR else 2 * SEARCHED  # other masks take longer to choose
        memory += copies * weights * (searched + STEPPED * taught / recipe.schedule.tokens_in_step)
    rates = _rates(model.device, model.dtype)
    # CPUs multiply activations in their dtype and sum in float32: as measured, at the mean of both rates.
    mean = sqrt(rates[0] * rates[1]) if model.device.type == "cpu" else rates[1]
    return fast / rates[0] + grams / mean + exact / rates[1] + memory / rates[2]


def writing_seconds(model: StreamedModel, recipe: Recipe) -> float:
    """What the dense model takes to write its part of the calibration text."""
    samples = recipe.drawn if recipe.calibration == "self" else recipe.samples_written
    return samples * recipe.seq_len * _written(model, recipe)


def distilling_seconds(model: StreamedModel, recipe: Recipe) -> float:
    """What distilling on DISTILLED tokens takes, with what the dense model writes of them."""
    own = 1.0 if recipe.calibration == "self" else OWN
    return DISTILLED * (_of_token(model, recipe, TAUGHT, RETURNED) + own * _written(model, recipe))


def _written(model: StreamedModel, recipe: Recipe) -> float:
    """Seconds for a token that the dense model writes."""
    chosen = 4 * CHOSEN * model.vocabulary / _rates(model.device, model.dtype)[2]
    return _of_token(model, recipe, 1, WRITTEN) + chosen


def distilling_bytes(model: StreamedModel) -> float:
    """The memory that it takes (docs/lab/recovery.md): both models, and of each weight that is kept a copy and moments
    of 10 bytes, and a bit."""
    return LIBRARIES + weights_of(model) * (2 * model.dtype.itemsize + 5.25)


def weights_of(model: StreamedModel) -> int:
    return int(model.model.num_parameters())


@cache
def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """In a second: multiply-adds in `dtype` and in float32, and bytes that are read and written."""
    x, w, long = (torch.ones(shape, device=device) for shape in ((2048, 1024), (1024, 1024), (1 << 24,)))
    narrow, size = (x.to(dtype), w.to(dtype)), x.numel() * len(w)
    fast, exact = _seconds(lambda: narrow[0] @ narrow[1], device), _seconds(lambda: x @ w, device)
    return size / fast, size / exact, 2 * long.nbytes / _seconds(lambda: long.mul_(1.0), device)


def _of_token(model: StreamedModel, recipe: Recipe, multiplied: int, touched: int) -> float:
    """Seconds, if each weight is multiplied and each channel of the linears touched so many times."""
    channels, reached = 0.0, float(weights_of(model))
    for rows, columns, copies, share in _shapes(model, recipe):
        channels += (rows + columns) * copies * share
        reached -= rows * columns * copies * (1 - share)
    fast, _, memory = _rates(model.device, model.dtype)
    return multiplied * reached / fast + 4 * touched * channels / memory


def _shapes(model: StreamedModel, recipe: Recipe, layers: range | None = None) -> Iterator[tuple[int, int, int, float]]:
    """(out, in, copies, share of the tokens that reach each) of what may be pruned. Linears of experts have copies."""
    for index in range(len(model.layers)) if layers is None else layers:
        for linear in linears_to_prune(model, index, recipe).values():
            yield linear.out_features, linear.in_features, 1, 1.0
        for files in experts_to_prune(model, index, recipe).values():
            for kind in files.layout.kinds:
                yield *files.layout.shape(kind), files.layout.num_experts, _share(model, files.layout.num_experts)


def _share(model: StreamedModel, experts: int) -> float:
    """Of the tokens, which reach an expert."""
    return min(1.0, (getattr(text_config(model.config), "num_experts_per_tok", None) or 1) / experts)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of several runs; on a CPU its own time, so that other work on the machine does not count."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    found: list[float] = []
    while sum(found) < 0.1:
        begun = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - begun)
    return min(found)


def about(seconds: float) -> str:
    """As exact as an estimate is."""
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{max(1, round(seconds / 10)) * 10} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.{0 if minutes > 600 else 1}f} h"


def peak_bytes(model: StreamedModel, recipe: Recipe) -> float:
    """The most memory that is in use at a time; without that of a model that writes its own text."""
    routed = [sum(layout.weights for layout in experts_modules(layer).values()) for layer in model.layers]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.layers]
    layer = max(size - own for size, own in zip(sizes, routed, strict=True)) * model.stored_dtype.itemsize
    embedding = model.model.get_input_embeddings().weight
    activations = recipe.drawn * recipe.seq_len * embedding.shape[1] * (8 if any(routed) else 4)
    heads = 1 if model.model.all_tied_weights_keys else 2
    factor = WIDE_LAYERS if model.dtype == torch.float32 else LAYERS
    return LIBRARIES + factor * layer + heads * embedding.numel() * model.dtype.itemsize + activations


def sizes_of(model: StreamedModel, plan: Plan, recipe: Recipe) -> tuple[Sizes, int, int]:
    """(What each token multiplies; bytes of all weights, and of those that will be stored, both without the smallest
    tensors)."""
    itemsize, pruned, used, rounded = model.stored_dtype.itemsize, 0.0, 0.0, 0
    dense = sum(prod(model.tensors.shape(name)) for name in model.tensors.files) * itemsize
    for index, layer in enumerate(model.layers):
        own = sum(layer.get_submodule(name).weight.numel() for name in plan.pruned[index])
        rounded += sum(layer.get_submodule(name).weight.numel() for name in plan.in_int8[index])
        experts = [model.experts[index][path].layout for path in plan.experts[index]]
        pruned += own + sum(layout.weights for layout in experts)
        used += own + sum(layout.weights * _share(model, layout.num_experts) for layout in experts)
    head = getattr(output_head(model.model), "weight", None)
    heads, left = 0 if head is None else head.numel(), model.linear_weights - pruned - rounded
    sizes = Sizes(len(model.layers), used, heads, left, rounded)
    saved = pruned * (itemsize - recipe.weight_format.bits_per_weight(model.stored_dtype) / 8)
    in_int8 = sum(prod(model.tensors.shape(name)) for name in embeddings_in_int8(model, recipe))
    saved += (rounded + in_int8) * (itemsize - 1)
    return sizes, dense, round(dense - saved)

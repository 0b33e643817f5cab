"""Time per token of one decoder layer and of whole models, dense beside 2:4, compiled and in CUDA graphs. Part of
gpu_session."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks import gpu_timing, llama
from benchmarks.gpu_check import Part
from benchmarks.gpu_timing import DEVICE, Row
from benchmarks.llama import Caches, DecoderLayer, Model, Shape
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel

TOKENS = (1, 8, 64, 256)
LAYERS = (
    Shape("one layer of Llama 8B", 4096, 14336, 32, 8, 128, 1, 0),
    Shape("one layer of Llama 70B", 8192, 28672, 64, 8, 128, 1, 0),
)
MODELS = (
    Shape("Llama 1B", 2048, 8192, 32, 8, 64, 16, 128256),
    Shape("Llama 8B", 4096, 14336, 32, 8, 128, 32, 128256),
)
_REPLAYS = 40
_WARM_UP = 5

Compute = Callable[[], torch.Tensor]


def parts() -> list[Part]:
    """A part for each layer and model."""
    # Compiling for each number of tokens takes the longest.
    layers = [Part(f"decode {shape.name}", "decode", partial(time_layer, shape), silence=180) for shape in LAYERS]
    return layers + [
        Part(f"decode {shape.name}", "decode", partial(time_model, shape), silence=180) for shape in MODELS
    ]


def time_layer(shape: Shape) -> Iterator[Row]:
    """Checks and times of one decoder layer, for each number of tokens, each of another sequence."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    pair = llama.random_layers(shape, generator)
    for tokens in TOKENS:
        yield {"at": f"{shape.name}, {tokens} tokens"}
        caches = Caches(shape, tokens, generator)
        x, residual = torch.randn(2, tokens, shape.hidden, dtype=llama.DTYPE, device=DEVICE, generator=generator)

        def compute(layer: DecoderLayer, function: Callable, dtype: torch.dtype = llama.DTYPE) -> torch.Tensor:
            return torch.add(*function(layer, x.to(dtype), residual.to(dtype), caches.keys, caches.values))

        yield from _measure(shape, tokens, pair, compute)


def time_model(shape: Shape) -> Iterator[Row]:
    """The same of a whole model, from token ids to logits."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    pairs = []
    for index in range(shape.layers):
        yield {"at": f"{shape.name}, weights of layer {index}"}
        pairs.append(llama.random_layers(shape, generator))
    words = torch.randn(shape.vocabulary, shape.hidden, device=DEVICE, generator=generator).to(llama.DTYPE)
    norm = torch.full((shape.hidden,), shape.hidden**-0.5, device=DEVICE)
    for tokens in TOKENS:
        yield {"at": f"{shape.name}, {tokens} tokens"}
        caches = [Caches(shape, tokens, generator) for _ in pairs]
        models = [Model([pair[which] for pair in pairs], caches, words, norm) for which in (0, 1)]
        ids = torch.randint(shape.vocabulary, (tokens,), device=DEVICE, generator=generator)

        def compute(model: Model, function: Callable, dtype: torch.dtype = llama.DTYPE) -> torch.Tensor:
            return model.step(ids, function, dtype)

        yield from _measure(shape, tokens, models, compute)


def _measure(shape: Shape, tokens: int, pair: Sequence, compute: Callable[..., torch.Tensor]) -> Iterator[Row]:
    """A row that judges the sparse one of `pair` (dense, sparse), and one with the times of both if it is right.

    Args:
        compute: its result for one of the pair, `DecoderLayer.forward` or it compiled, and a dtype.
    """
    common: Row = {"model": shape.name, "tokens": tokens, "context": shape.context}
    exact = compute(pair[0], DecoderLayer.forward, torch.float32)
    torch.compiler.reset()  # or torch would treat the number of tokens as dynamic at the second one
    function, refused = torch.compile(DecoderLayer.forward, dynamic=False, fullgraph=True), None
    try:
        results = [compute(one, function) for one in pair]
    except Exception as error:  # no Triton, or no C compiler for it; torch raises errors of many types
        refused = " ".join((str(error) or type(error).__name__).split())[:200]
        function = DecoderLayer.forward
        results = [compute(one, function) for one in pair]
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in results]
    # Dense and sparse products round alike, so their errors are alike; a wrong weight or order of channels is not.
    right = errors[1] <= 1.5 * errors[0] + 1e-3
    # Other kernels serve if ours fails its self-test, and are not what is to be timed.
    choices = {str(module.choice) for module in _sparse_linears(pair[1])}
    row = common | {"check": "decode", "kernels": sorted(choices), "ok": right and choices == {CutlassKernel.name}}
    row["errors"] = errors if right else [str(error) for error in errors]  # JSON has no NaN
    yield row | {"same_choices": float((results[0].argmax(-1) == results[1].argmax(-1)).float().mean())}
    if not row["ok"]:
        return
    yield {"at": f"{shape.name}, {tokens} tokens, times"}
    dense, sparse = alternating([partial(compute, one, function) for one in pair])
    yield common | {"dense_us": dense, "us": sparse, "not_compiled": refused}


def _sparse_linears(one: DecoderLayer | Model) -> list[llama.SparseLinear]:
    layers = one.layers if isinstance(one, Model) else [one]
    return [module for layer in layers for module in layer.modules() if isinstance(module, llama.SparseLinear)]


def alternating(calls: Sequence[Compute]) -> list[float]:
    """Median microseconds of each call, captured in a CUDA graph. The graphs take turns, so that a change of clocks
    meets all alike."""
    graphs = [gpu_timing.capture([call])[0] for call in calls]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(_REPLAYS):
        for graph, found in zip(graphs, times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1000)
    return [statistics.median(found[_WARM_UP:]) for found in times]


def line(row: Row) -> str:
    """A row with times, as text."""
    return (
        f"{row['model']}, {row['tokens']} tokens: {row['us'] / row['tokens']:.1f} us per token, dense"
        f" {row['dense_us'] / row['tokens']:.1f} us, {row['dense_us'] / row['us']:.2f}x"
        + (f" (not compiled: {row['not_compiled']})" if row["not_compiled"] else "")
    )

"""Times of the GPU kernels beside the dense product and the limits of memory and arithmetic. Part of gpu_check."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, FP8, INT8
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.format.weight_format import Parts, WeightFormat
from ria_vllm.serve.kernels.base import LinearKernel, LinearLayerConfig
from ria_vllm.serve.kernels.cuda import backend
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel

DEVICE = torch.device("cuda", 0)
SHAPES = ((11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672))
TOKENS = (1, 16, 64, 256, 2048)
# Hidden size: the linears of a Llama decoder layer of 8B, of 70B.
LAYERS = {
    4096: ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    8192: ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}

# The dtype in which our kernel multiplies: how weights are stored for it. Inputs of int8 are rounded to int8.
FORMATS: dict[torch.dtype, WeightFormat] = {torch.bfloat16: FLOAT, FP8_DTYPE: FP8, torch.int8: INT8}

# Products cycle through copies of their weight that together exceed any L2 cache, so that each reads its weight from
# memory, as it does in a model.
_BYTES_IN_TURN = 256 * 2**20
_REPLAYS = 15

HEADER = (
    f"{'out':>6} {'in':>6} {'tokens':>6} {'kernel':>14} {'us':>9} {'dense us':>9} {'speedup':>8}"
    f" {'bytes limit us':>14} {'FLOP limit us':>13}"
)

Row = dict[str, Any]


def capture(calls: Sequence[Callable[[], torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A CUDA graph of the calls in order, after a warm-up on a side stream, as torch requires, and their outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return graph, outputs


def microseconds(calls: Sequence[Callable[[], torch.Tensor]], least: int = 8) -> float:
    """Median time of one call, measured by replaying a graph that repeats the calls until it has at least `least`."""
    graph, _ = capture(list(calls) * math.ceil(least / len(calls)))
    count = math.ceil(least / len(calls)) * len(calls)
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return statistics.median(times[3:])


def measure_limits() -> Iterator[Row]:
    """One row: bytes per second of a large copy, and FLOP per second of a large dense bf16 product, on this GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = microseconds([partial(target.copy_, source)])
    del source, target
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    product = microseconds([lambda: square @ square], least=3)
    yield {"bytes_per_second": 2 * 2**30 / copy * 1e6, "dense_flop_per_second": 2 * 8192**3 / product * 1e6}


def with_limits(row: Row, limits: Row) -> Row:
    """The row with the least microseconds that its bytes and FLOP take, instead of these; None where the limit is
    unknown."""
    limited = {key: value for key, value in row.items() if key not in ("bytes", "flop")}
    for what, rate in (("bytes", "bytes_per_second"), ("flop", "dense_flop_per_second")):
        limited[f"{what}_limit_us"] = row[what] / limits[rate] * 1e6 if rate in limits else None
    return limited


def config_of(out_features: int, in_features: int, weight_format: WeightFormat = FLOAT) -> LinearLayerConfig:
    """A layer with bfloat16 activations."""
    rounded = torch.int8 if weight_format == INT8 else None
    return LinearLayerConfig(DEVICE, torch.bfloat16, weight_format, out_features, in_features, rounded)


def stored_in(compressed: torch.Tensor, bitmask: torch.Tensor, weight_format: WeightFormat) -> Parts:
    """The parts of a weight in this format, from its kept values and its bitmask."""
    values, scales = weight_format.quantize(compressed, compressed.dtype)
    return weight_format.encode_kept(values, bitmask, scales)


def random_weights(out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16) -> list[Parts]:
    """Copies of one random weight as `pack` takes it, stored as FORMATS says of `dtype`."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dense = torch.randn(out_features, in_features, dtype=torch.bfloat16, device=DEVICE, generator=generator)
    parts = stored_in(*sparse24.compress(dense), FORMATS[dtype])
    bits = FORMATS[dtype].bits_per_weight(torch.bfloat16)
    copies = max(2, math.ceil(_BYTES_IN_TURN / (out_features * in_features * bits / 8)))
    return [{name: tensor.clone() for name, tensor in parts.items()} for _ in range(copies)]


def time_kernel(kernel: type[LinearKernel], shape: tuple[int, int]) -> Iterator[Row]:
    """Rows with shape, tokens, kernel, microseconds, dense microseconds, bytes and FLOP."""
    out_features, in_features = shape
    config = config_of(*shape)
    if reason := kernel.is_supported(DEVICE) or kernel.can_implement(config):
        yield {"kernel": kernel.name, "skipped": reason}
        return
    weights = random_weights(*shape)
    dense_weights = [FLOAT.decode(weights[0], torch.bfloat16) for _ in weights]
    packed = [kernel.pack(config, parts) for parts in weights]
    for tokens in TOKENS:
        yield {"at": f"{tokens} tokens"}
        x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=DEVICE)
        row = sizes_of(shape, tokens) | {
            "kernel": kernel.name,
            "us": microseconds([partial(kernel.apply, config, x, p, None, None) for p in packed]),
            "dense_us": microseconds([partial(torch.nn.functional.linear, x, w) for w in dense_weights]),
        }
        traffic = out_features * in_features * 9 / 8 + 2 * tokens * (out_features + in_features)
        yield row | {"bytes": traffic, "flop": tokens * out_features * in_features}


def sizes_of(shape: tuple[int, int], tokens: int) -> Row:
    return {"out_features": shape[0], "in_features": shape[1], "tokens": tokens}


def time_narrow(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Row]:
    """The same rows for products of fp8 or int8 operands, without the rounding of x: ours, and torch's dense one if it
    has one. Their `dense_us` is that of the bfloat16 product."""
    out_features, in_features = shape
    weight_format, parts = FORMATS[dtype], random_weights(*shape, dtype)
    packed = [CutlassKernel.pack(config_of(*shape, weight_format), one) for one in parts]
    plain = sparse24.decompress(parts[0]["compressed"].bfloat16(), parts[0]["bitmask"])
    bfloat16 = [plain.clone() for _ in range(max(2, math.ceil(_BYTES_IN_TURN / plain.nbytes)))]
    narrow = [weight.to(dtype) for weight in bfloat16 + bfloat16]  # half the bytes, twice the copies
    scales = parts[0]["weight_scale"].flatten()
    for tokens in TOKENS:
        yield {"at": f"{tokens} tokens"}
        x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=DEVICE)
        q, x_scales = backend.round_tokens(x, packed[0][0])
        common = sizes_of(shape, tokens) | {
            "dense_us": microseconds([partial(torch.nn.functional.linear, x, w) for w in bfloat16]),
            "bytes": out_features * in_features * 5 / 8 + tokens * (in_features + 2 * out_features),
            "flop": tokens * out_features * in_features / 2,
        }
        ours = [
            lambda p=p: torch.ops.ria.sparse24_linear.cutlass(q, *p[:2], None, x_scales, p[2], torch.bfloat16)
            for p in packed
        ]
        yield {**common, "kernel": f"cutlass {weight_format.name}", "us": microseconds(ours)}
        dense = [lambda w=w: _dense_narrow(q, x_scales, w, scales) for w in narrow]
        try:
            dense[0]()
        except (RuntimeError, ValueError):
            continue  # this torch or this GPU does not support scales by row; int8 needs more than 16 tokens
        yield {**common, "kernel": f"dense {weight_format.name}", "us": microseconds(dense)}


def _dense_narrow(x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """torch's own product; of int8 the sums alone."""
    if x.dtype == torch.int8:
        return torch._int_mm(x, weight.t())
    by_row = x_scales[:, None], scales[None]
    return torch._scaled_mm(x, weight.t(), *by_row, out_dtype=torch.bfloat16, use_fast_accum=True)


def line(row: Row) -> str:
    """A row of the table under HEADER."""
    limits = [row["bytes_limit_us"], row["flop_limit_us"]]
    bytes_limit, flop_limit = ("-" if limit is None else f"{limit:.1f}" for limit in limits)
    return (
        f"{row['out_features']:6} {row['in_features']:6} {row['tokens']:6} {row['kernel']:>14} {row['us']:9.1f}"
        f" {row['dense_us']:9.1f} {row['dense_us'] / row['us']:7.2f}x {bytes_limit:>14} {flop_limit:>13}"
    )


def time_packing() -> Iterator[Row]:
    """Milliseconds to pack the checkpoint's tensors, already on the GPU, for the kernel, by shape."""
    for shape in SHAPES:
        yield {"at": str(shape)}
        config, parts = config_of(*shape), random_weights(*shape)[0]
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            CutlassKernel.pack(config, parts)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        yield {"out_features": shape[0], "in_features": shape[1], "ms": statistics.median(times)}


def packing_line(row: Row) -> str:
    return f"packing {row['out_features']} x {row['in_features']}: {row['ms']:.2f} ms"


def _add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual addition and RMSNorm, as before q, k, v and before gate, up."""
    residual = x + residual
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return normed.to(x.dtype) * weight, residual


def _add_norm_gather(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, permutation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, residual = _add_norm(x, residual, weight)
    return normed.index_select(-1, permutation), residual


def time_gather() -> Iterator[Row]:
    """What a decoder layer's gathers, compiled together with its norms, cost in comparison with its products."""
    for hidden, shapes in LAYERS.items():
        torch.compiler.reset()  # or torch would treat the hidden size as dynamic at the second one
        plain, gathered = torch.compile(_add_norm), torch.compile(_add_norm_gather)
        packed = [
            [CutlassKernel.pack(config_of(*shape), parts) for parts in random_weights(*shape)] for shape in shapes
        ]
        permutation = torch.randperm(hidden, device=DEVICE).int()
        weight = torch.rand(hidden, dtype=torch.bfloat16, device=DEVICE)
        for tokens in TOKENS:
            yield {"at": f"hidden size {hidden}, {tokens} tokens"}
            x, residual = torch.randn(2, tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
            try:
                plain(x, residual, weight), gathered(x, residual, weight, permutation)
            except Exception as error:  # no Triton, or no C compiler for it; torch raises errors of many types
                refused = " ".join((str(error) or type(error).__name__).split())[:200]
                yield {"part": "gather times", "skipped": f"torch.compile: {refused}"}
                return
            products = 0.0
            for shape, copies in zip(shapes, packed, strict=True):
                y = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=DEVICE)
                config = config_of(*shape)
                calls = [lambda p=p, y=y, c=config: CutlassKernel.apply(c, y, p, None, None) for p in copies]
                products += microseconds(calls)
            without = microseconds([lambda: plain(x, residual, weight)[0]])
            with_it = microseconds([lambda: gathered(x, residual, weight, permutation)[0]])
            share = 2 * (with_it - without) / (products + 2 * without)
            row = {"hidden": hidden, "tokens": tokens, "norm_us": without, "norm_and_gather_us": with_it}
            yield row | {"products_us": products, "share": share}


def gather_line(row: Row) -> str:
    return (
        f"hidden size {row['hidden']}, {row['tokens']} tokens: norm {row['norm_us']:.1f} us, with a gather"
        f" {row['norm_and_gather_us']:.1f} us; both gathers {row['share']:.1%} of the layer's norms and products"
    )

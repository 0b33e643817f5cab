"""Checks of every GPU kernel and tile against float64, and under CUDA graphs. Part of gpu_check."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_tiles, gpu_timing
from benchmarks.gpu_timing import DEVICE, Row
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, FP8, INT8
from ria_vllm.format.token_rounding import quantize_fp8, quantize_tokens
from ria_vllm.format.weight_format import Parts, WeightFormat
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig, LinearKernel, LinearLayerConfig
from ria_vllm.serve.kernels.cuda import backend
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.cuda.bindings import library_of, num_sms_of
from ria_vllm.serve.kernels.cuda.experts import CutlassExpertsKernel
from ria_vllm.serve.kernels.cuda.tiles import COUNTER_BYTES, can_run

TOKENS = (1, 7, 16, 64, 333, 2048)
GRAPH_TOKENS = (1, 64, 333, 2048)
MOST_REAL_LINEARS = 32
TURNS = 32  # products in a row, of a check of two streams
GUARD = 4096  # elements before and after y that no kernel may touch


class Layer:
    """A 2:4 linear on the GPU, with what is needed to compute its product in float64.

    Args:
        parts: as stored in `weight_format`.
        dtype: of activations, and of float weights.
    """

    def __init__(self, name: str, parts: Parts, weight_format: WeightFormat, dtype: torch.dtype):
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.name, self.dtype = name, dtype
        self.parts = {part: tensor.to(DEVICE) for part, tensor in parts.items()}
        self.weights, self.fp8 = self.parts["compressed"].dtype, weight_format == FP8
        self.stored = sparse24.decompress(self.parts["compressed"].double(), self.parts["bitmask"])
        if weight_format != FLOAT:
            self.stored *= self.parts["weight_scale"].double()
        self.out_features, self.in_features = self.stored.shape
        input_dtype = torch.int8 if weight_format == INT8 else None
        self.config = LinearLayerConfig(DEVICE, dtype, weight_format, self.out_features, self.in_features, input_dtype)
        self.bias = torch.randn(self.out_features, device=DEVICE, generator=generator).to(self.dtype)
        self.permutation = torch.randperm(self.in_features, device=DEVICE, generator=generator).int()

    def activations(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(tokens)
        return torch.randn(tokens, self.in_features, device=DEVICE, generator=generator).to(self.dtype)

    def excess(self, y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, rounded: bool) -> float:
        """Largest error of y [tokens, out] in units of what rounding explains: one ulp of y and the accumulation.

        Below 1 for a correct product; the largest float if y is not finite, because JSON has no infinity.

        Args:
            rounded: the kernel rounds x to fp8; its tensor cores are reported to keep about 14 bits of each sum of 128
                products. All kernels round the x of int8 weights.
        """
        x = dequantized(x, self.weights) if rounded or self.config.input_dtype else x.double()
        exact = x @ self.stored.t()
        if bias is not None:
            exact += bias.double()
        accumulation = (x.abs() @ self.stored.abs().t()) * 2.0 ** (-11 if rounded else -16)
        error = (y.double() - exact).abs() / (exact.abs() * torch.finfo(self.dtype).eps + accumulation + 1e-30)
        return float(error.max()) if bool(torch.isfinite(y).all()) else sys.float_info.max


def dequantized(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [tokens, in] after rounding to int8 or fp8, in float64."""
    if dtype == torch.int8:
        integers, scales = quantize_tokens(x)
        return integers.double() * scales.double()
    values, scales = quantize_fp8(x)
    return values.double() * scales.double()[:, None]


def random_layer(out_features: int, in_features: int, dtype: torch.dtype, weights: torch.dtype | None = None) -> Layer:
    """Random weights in `dtype`, or in fp8 or int8 if `weights` says so; activations in `dtype`."""
    generator = torch.Generator(DEVICE).manual_seed(out_features + in_features)
    dense = torch.randn(out_features, in_features, device=DEVICE, generator=generator).to(dtype) * in_features**-0.5
    weight_format = gpu_timing.FORMATS.get(weights, FLOAT)
    name = f"random {out_features}x{in_features}" + ("" if weight_format == FLOAT else f" {weight_format.name}")
    parts = gpu_timing.stored_in(*sparse24.compress(dense), weight_format)
    return Layer(name, parts, weight_format, dtype)


def real_layers(folder: Path) -> Iterator[Layer]:
    """One linear of each shape among the first MOST_REAL_LINEARS of a checkpoint."""
    from ria_vllm.checkpoint.reader import Reader  # not at the top: it needs more than torch

    reader = Reader(folder)
    shapes = set()
    for name in reader.sparse_names[:MOST_REAL_LINEARS]:
        linear = reader.linear(name)
        if linear.shape not in shapes and linear.format == FLOAT and linear.dtype in (torch.bfloat16, torch.float16):
            shapes.add(linear.shape)
            yield Layer(name, linear.parts, FLOAT, linear.dtype)


Kernel = type[LinearKernel]
Check = Callable[[Kernel, Layer, Sequence[torch.Tensor], Sequence[int]], Iterator[Row]]


def _by_kernel(name: str, check: Check, kernel: Kernel, layer: Layer, tokens: Sequence[int]) -> Iterator[Row]:
    """The check's rows for a layer packed by the kernel, or the reason why the kernel cannot serve it. Rows with the
    key `at` name the step that follows."""
    row = {"check": name, "kernel": kernel.name, "layer": layer.name, "dtype": str(layer.dtype)}
    if reason := kernel.is_supported(DEVICE) or kernel.can_implement(layer.config):
        yield {**row, "skipped": reason}
        return
    yield {"at": f"packing {layer.name}"}
    for found in check(kernel, layer, kernel.pack(layer.config, layer.parts), tokens):
        yield found if "at" in found else row | found


def check_kernel(kernel: Kernel, layer: Layer, tokens: Sequence[int] | None = None) -> Iterator[Row]:
    """Against float64, with and without bias and input permutation."""
    return _by_kernel("float64", _products, kernel, layer, tokens or TOKENS)


def check_graphs(kernel: Kernel, layer: Layer, tokens: Sequence[int] | None = None) -> Iterator[Row]:
    """Capture once and replay with other activations: the result must be bitwise equal to one without a graph."""
    return _by_kernel("CUDA graph", _graphs, kernel, layer, tokens or GRAPH_TOKENS)


def check_streams(kernel: Kernel, layer: Layer, tokens: Sequence[int] | None = None) -> Iterator[Row]:
    """Products that alternate between two streams, each after an event behind the one before it: the results must be
    bitwise equal to those on one stream."""
    return _by_kernel("two streams", _streams, kernel, layer, tokens or GRAPH_TOKENS)


def _products(
    kernel: Kernel, layer: Layer, packed: Sequence[torch.Tensor], tokens_of_products: Sequence[int]
) -> Iterator[Row]:
    rounded = layer.fp8 and kernel is CutlassKernel
    for tokens in tokens_of_products:
        yield {"at": f"{layer.name}, {tokens} tokens"}
        x = layer.activations(tokens)
        plain = kernel.apply(layer.config, x, packed, None, None)
        full = kernel.apply(layer.config, x, packed, layer.permutation, layer.bias)
        again = kernel.apply(layer.config, x, packed, None, None)
        gathered = x[:, layer.permutation.long()]
        excess = max(layer.excess(plain, x, None, rounded), layer.excess(full, gathered, layer.bias, rounded))
        repeats = torch.equal(plain, again)
        contiguous = plain.is_contiguous() and plain.shape == (tokens, layer.out_features)
        ok = excess < 1 and contiguous and (repeats or kernel is not CutlassKernel)
        yield {"tokens": tokens, "excess": excess, "repeats": repeats, "ok": ok}


def _graphs(
    kernel: Kernel, layer: Layer, packed: Sequence[torch.Tensor], tokens_of_products: Sequence[int]
) -> Iterator[Row]:
    for tokens in tokens_of_products:
        yield {"at": f"capturing {layer.name}, {tokens} tokens"}
        x = layer.activations(tokens)
        graph, (y,) = gpu_timing.capture([lambda: kernel.apply(layer.config, x, packed, None, layer.bias)])
        x.copy_(layer.activations(tokens + 1)[:tokens])
        for _ in range(3):
            graph.replay()
        expected = kernel.apply(layer.config, x, packed, None, layer.bias)
        yield {"tokens": tokens, "ok": torch.equal(y, expected)}


def _streams(
    kernel: Kernel, layer: Layer, packed: Sequence[torch.Tensor], tokens_of_products: Sequence[int]
) -> Iterator[Row]:
    streams = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    for tokens in tokens_of_products:
        yield {"at": f"{layer.name}, {tokens} tokens"}
        xs = [layer.activations(tokens), layer.activations(tokens + 1)[:tokens]]
        expected = [kernel.apply(layer.config, x, packed, None, layer.bias) for x in xs]
        torch.cuda.synchronize()
        ys = []
        for turn in range(TURNS):
            mine, other = streams[turn % 2], streams[1 - turn % 2]
            mine.wait_stream(other)
            with torch.cuda.stream(mine):
                ys.append(kernel.apply(layer.config, xs[turn % 2], packed, None, layer.bias))
        torch.cuda.synchronize()
        yield {"tokens": tokens, "ok": all(torch.equal(y, expected[turn % 2]) for turn, y in enumerate(ys))}


def try_concurrent(layer: Layer) -> Iterator[Row]:
    """How many products of our kernel come out wrong if two streams run them at once that have one workspace, which is
    not supported: that of the stream on which both were captured. Each stream replays a graph of TURNS products."""
    packed = CutlassKernel.pack(layer.config, layer.parts)
    streams = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    for tokens in GRAPH_TOKENS:
        yield {"at": f"{layer.name}, {tokens} tokens"}
        xs = [layer.activations(tokens), layer.activations(tokens + 1)[:tokens]]
        expected = [CutlassKernel.apply(layer.config, x, packed, None, None) for x in xs]
        calls = [partial(CutlassKernel.apply, layer.config, x, packed, None, None) for x in xs]
        captured = [gpu_timing.capture([call] * TURNS) for call in calls]
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, captured):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        wrong = sum(not torch.equal(y, e) for (_, ys), e in zip(captured, expected) for y in ys)
        clean = not any(bool(one[:COUNTER_BYTES].any()) for one in backend.workspaces(DEVICE.index))
        for one in backend.workspaces(DEVICE.index):
            one.zero_()
        yield {"tokens": tokens, "products": 2 * TURNS, "wrong": wrong, "counters_are_zero": clean}


def check_experts(dtype: torch.dtype, weights: torch.dtype | None) -> Iterator[Row]:
    """Experts of a layer against float64: eagerly, and from a CUDA graph that gets other tokens and other choices.

    There one token is computed with copies of its experts' weights; of 64, all experts compute all.
    """
    experts, hidden, intermediate, most = 8, 256, 128, 0.1 if weights else 0.02
    gate_up = random_layer(experts * 2 * intermediate, hidden, dtype, weights)
    down = random_layer(experts * hidden, intermediate, dtype, weights)
    first, second = (
        {key: one.unflatten(0, (experts, -1)) for key, one in layer.parts.items()} for layer in (gate_up, down)
    )
    config = ExpertsLayerConfig(
        DEVICE, dtype, gate_up.config.weight_format, experts, hidden, intermediate, Activation("silu"),
        input_dtype=gate_up.config.input_dtype,
    )  # fmt: skip
    packed = CutlassExpertsKernel.pack(config, first, second, None, None)
    for tokens in (1, 64):
        yield {"at": f"experts, {tokens} tokens"}
        x = gate_up.activations(tokens)
        shares, ids = torch.rand(tokens, experts, device=DEVICE).topk(2)

        def apply() -> torch.Tensor:
            return CutlassExpertsKernel.apply(config, x, shares, ids, packed, None, None)

        def off(y: torch.Tensor) -> float:
            gates, ups = (x.double() @ gate_up.stored.t()).unflatten(1, (experts, 2, -1)).unbind(2)
            of_all = torch.einsum(
                "tei,ehi->teh", torch.nn.functional.silu(gates) * ups, down.stored.unflatten(0, (experts, -1))
            )
            exact = (of_all.take_along_dim(ids[..., None], 1) * shares[..., None]).sum(1)
            return float((y.double() - exact).norm() / exact.norm())

        eager = off(apply())
        graph, (y,) = gpu_timing.capture([apply])
        x.copy_(gate_up.activations(tokens + 1)[:tokens])
        ids.copy_((ids + 1) % experts)
        graph.replay()
        error = max(eager, off(y))
        row = {"check": "experts", "kernel": CutlassExpertsKernel.name, "layer": gate_up.name, "dtype": str(dtype)}
        ok = error < most  # no NaN is
        yield row | {"tokens": tokens, "excess": error / most if ok else sys.float_info.max, "ok": ok}


def check_packing(layer: Layer) -> Iterator[Row]:
    """Metadata packed on the GPU must equal metadata packed on the host."""
    values, metadata, *_ = CutlassKernel.pack(layer.config, layer.parts)
    host = library_of(DEVICE.index).pack_metadata(layer.parts["bitmask"].cpu(), values.itemsize * 8)
    yield {"check": "metadata on GPU and CPU agree", "layer": layer.name, "ok": torch.equal(metadata.cpu(), host)}


def check_tile(name: str, layer: Layer, tokens: Sequence[int] | None = None) -> Iterator[Row]:
    """A tile of our library, and guards around the output.

    With every split of K that is timed; if `tokens` are given, because time is short, only with SPLITS_K.
    """
    library, num_sms = library_of(DEVICE.index), num_sms_of(DEVICE.index)
    tile = library.tile_names.index(name)
    values, metadata, *scales = CutlassKernel.pack(layer.config, layer.parts)
    sizes = (layer.out_features, 2 * values.shape[1])
    for split_k in gpu_tiles.SPLITS_K if tokens else gpu_tiles.timed_splits(name):
        for count in tokens or TOKENS:
            if not can_run(library, tile, layer.weights, sizes, count, split_k, num_sms):
                continue
            yield {"at": f"split_k {split_k}, {layer.name}, {count} tokens"}
            x, elements = layer.activations(count), count * layer.out_features
            buffer = torch.full((elements + 2 * GUARD,), 7.0, dtype=layer.dtype, device=DEVICE)
            y = buffer[GUARD : GUARD + elements].view(count, layer.out_features)
            operand, *x_scales = backend.round_tokens(x, values) if scales else (x,)
            both = (*scales, *x_scales) or None
            library.linear(
                tile, split_k, operand, values, metadata, layer.bias, y, backend.workspace(DEVICE.index), both
            )
            excess = layer.excess(y, x, layer.bias, layer.fp8)
            guarded = bool((buffer[:GUARD] == 7).all() and (buffer[-GUARD:] == 7).all())
            row = {"check": f"tile {name} split_k {split_k}", "kernel": "cutlass", "layer": layer.name}
            yield {**row, "tokens": count, "excess": excess, "guarded": guarded, "ok": excess < 1 and guarded}

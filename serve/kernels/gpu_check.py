"""Checks and times every CUDA backend on the GPU at hand: `python -m ria_vllm.serve.kernels.gpu_check`.

Needs torch and this package, not vLLM. Prints one table and writes one JSON. In order, so that a run that is cut short
has done the most important first: correctness against float64, CUDA graphs, times beside the dense product and the
hardware's limits, then times of every tile, from which cutlass_tiles.MEASURED is filled.
"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

from ria_vllm import sparse24
from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels import cuda_compile, cusparselt, cutlass, fp8, gpu_timing, reference, torch_cutlass
from ria_vllm.serve.kernels.cuda_library import library_of, multiprocessors
from ria_vllm.serve.kernels.cutlass_tiles import SPLIT_FORCED, SPLIT_HEURISTIC, SPLIT_NONE, WORKSPACE_BYTES

BACKENDS: tuple[ModuleType, ...] = (cutlass, cusparselt, torch_cutlass, reference)
TOKENS = (1, 7, 16, 64, 333, 2048)
SHAPES_7B = ((4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096))
SMALL_SHAPES = ((64, 64), (136, 192), (1000, 576))
MOST_REAL_LAYERS = 8
GUARD = 4096  # elements before and after y that no kernel may touch
DEVICE = torch.device("cuda", 0)


class Layer:
    """A 2:4 layer on the GPU and its product in float64. With scales [out] its values are fp8, activations `dtype`."""

    def __init__(
        self,
        name: str,
        compressed: torch.Tensor,
        bitmask: torch.Tensor,
        scales: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.name = name
        self.parts = tuple(tensor.to(DEVICE) for tensor in (compressed, bitmask, scales) if tensor is not None)
        self.weights, self.dtype = compressed.dtype, dtype or compressed.dtype
        self.fp8 = scales is not None
        self.stored = sparse24.decompress(self.parts[0].double(), self.parts[1])
        if self.fp8:
            self.stored *= self.parts[2].double()[:, None]
        self.out_features, self.in_features = self.stored.shape
        self.bias = torch.randn(self.out_features, device=DEVICE, generator=generator).to(self.dtype)
        self.order = torch.randperm(self.in_features, device=DEVICE, generator=generator).int()

    def activations(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(tokens)
        return torch.randn(tokens, self.in_features, device=DEVICE, generator=generator).to(self.dtype)

    def excess(self, y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> float:
        """Largest error in units of what rounding explains: an ulp of y and the accumulation. Right is below 1.

        fp8's accumulation: the tensor cores are reported to keep about 14 bits of each sum of 128 products.
        """
        x = dequantized(x) if self.fp8 else x.double()
        exact = x @ self.stored.t()
        if bias is not None:
            exact += bias.double()
        accumulation = (x.abs() @ self.stored.abs().t()) * 2.0 ** (-11 if self.fp8 else -16)
        error = (y.double() - exact).abs() / (exact.abs() * torch.finfo(self.dtype).eps + accumulation + 1e-30)
        return float(error.max()) if bool(torch.isfinite(y).all()) else float("inf")


def dequantized(x: torch.Tensor) -> torch.Tensor:
    """What is left of x [tokens, in] after its rounding to fp8, in float64."""
    values, scales = fp8.quantize(x)
    return values.double() * scales.double()[:, None]


def random_layer(out_features: int, in_features: int, dtype: torch.dtype, weights: torch.dtype | None = None) -> Layer:
    """`weights`: float8_e4m3fn for weights in fp8 under activations of `dtype`; else they are of `dtype` too."""
    generator = torch.Generator(DEVICE).manual_seed(out_features + in_features)
    dense = torch.randn(out_features, in_features, device=DEVICE, generator=generator).to(dtype) * in_features**-0.5
    compressed, bitmask = sparse24.compress(dense)
    if weights != fp8.DTYPE:
        return Layer(f"random {out_features}x{in_features}", compressed, bitmask)
    values, scales = fp8.quantize(compressed)
    return Layer(f"random {out_features}x{in_features} fp8", values, bitmask, scales, dtype)


def real_layers(folder: Path) -> Iterator[Layer]:
    """Layers of a checkpoint, one of each shape first."""
    reader = Reader(folder)
    shapes = set()
    for name in reader.sparse_names:
        linear = reader.linear(name)
        if linear.shape not in shapes and linear.compressed.dtype in (torch.bfloat16, torch.float16):
            shapes.add(linear.shape)
            yield Layer(name, linear.compressed, linear.bitmask)
        if len(shapes) == MOST_REAL_LAYERS:
            return


def check_backends(layer: Layer) -> Iterator[dict[str, Any]]:
    """Every backend that takes the layer, with and without bias and input permutation."""
    for backend in BACKENDS:
        row = {"check": "float64", "backend": backend.NAME, "layer": layer.name, "dtype": str(layer.dtype)}
        reason = backend.unavailable(DEVICE, layer.weights, layer.out_features, layer.in_features)
        if reason:
            yield {**row, "skipped": reason}
            continue
        packed = backend.pack(*layer.parts)
        for tokens in TOKENS:
            x = layer.activations(tokens)
            plain = backend.apply(x, packed, layer.out_features, None, None)
            full = backend.apply(x, packed, layer.out_features, layer.order, layer.bias)
            again = backend.apply(x, packed, layer.out_features, None, None)
            excess = max(layer.excess(plain, x, None), layer.excess(full, x[:, layer.order.long()], layer.bias))
            repeats = torch.equal(plain, again)
            contiguous = plain.is_contiguous() and plain.shape == (tokens, layer.out_features)
            yield {**row, "tokens": tokens, "excess": excess, "repeats": repeats, "ok": excess < 1 and contiguous}


def check_tiles(layer: Layer) -> Iterator[dict[str, Any]]:
    """Every tile and division of K of our library, with guards around the output."""
    library, sms = library_of(DEVICE.index), multiprocessors(DEVICE.index)
    values, metadata, *scales = cutlass.pack(*layer.parts)
    sizes = (layer.out_features, layer.in_features)
    host = library.pack_metadata(layer.parts[1].cpu(), values.itemsize * 8)
    yield {"check": "metadata on GPU and CPU agree", "layer": layer.name, "ok": torch.equal(metadata.cpu(), host)}
    if absent := cuda_compile.absent_tiles(library.path.name, library.tile_names):
        reason = f"{', '.join(absent)}; `ria-vllm build-kernels --tiles all` compiles them"
        yield {"check": "all tiles are there", "layer": layer.name, "backend": "cutlass", "skipped": reason}
    for tile, name in enumerate(library.tile_names):
        for split in (SPLIT_NONE, SPLIT_HEURISTIC, SPLIT_FORCED, 3):
            for tokens in TOKENS:
                need = library.workspace_bytes(tile, layer.weights, sizes, tokens, split, sms)
                if not library.accepts(tile, layer.weights, sizes, tokens, split, sms) or need > WORKSPACE_BYTES:
                    continue
                x, count = layer.activations(tokens), tokens * layer.out_features
                buffer = torch.full((count + 2 * GUARD,), 7.0, dtype=layer.dtype, device=DEVICE)
                y = buffer[GUARD : GUARD + count].view(tokens, layer.out_features)
                operand, *x_scales = fp8.quantize(x) if layer.fp8 else (x,)
                both = (*scales, *x_scales) or None
                workspace = cutlass.workspace(DEVICE.index)
                library.linear(tile, split, operand, values, metadata, layer.bias, y, workspace, both)
                excess = layer.excess(y, x, layer.bias)
                guarded = bool((buffer[:GUARD] == 7).all() and (buffer[-GUARD:] == 7).all())
                row = {"check": f"tile {name} split {split}", "backend": "cutlass", "layer": layer.name}
                yield {**row, "tokens": tokens, "excess": excess, "guarded": guarded, "ok": excess < 1 and guarded}


def check_graphs(layer: Layer) -> Iterator[dict[str, Any]]:
    """Capture once, replay with other activations: the same bits as without a graph."""
    for backend in BACKENDS[:3]:
        if backend.unavailable(DEVICE, layer.weights, layer.out_features, layer.in_features):
            continue
        packed = backend.pack(*layer.parts)
        for tokens in (1, 64, 333):
            x = layer.activations(tokens)
            graph, (y,) = gpu_timing.capture([lambda: backend.apply(x, packed, layer.out_features, None, layer.bias)])
            x.copy_(layer.activations(tokens + 1)[:tokens])
            for _ in range(3):
                graph.replay()
            expected = backend.apply(x, packed, layer.out_features, None, layer.bias)
            row = {"check": "CUDA graph", "backend": backend.NAME, "layer": layer.name, "tokens": tokens}
            yield {**row, "ok": torch.equal(y, expected)}


def guarded(rows: Callable[[], Iterator[dict[str, Any]]], what: str, results: list[dict[str, Any]]) -> None:
    """Collects rows; an exception becomes a failed row, so that one broken backend does not hide the rest."""
    try:
        for row in rows():
            results.append(row)
            if row.get("ok") is False:
                click.echo(f"FAILED {row}")
    except (RiaError, RuntimeError) as error:
        results.append({"check": what, "ok": False, "error": str(error).splitlines()[0]})
        click.echo(f"FAILED {what}: {error}")


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Real weights.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="gpu_check.json", show_default=True)
@click.option("--seconds", default=420, show_default=True, help="Start no new measurement after this long.")
@click.option("--quick", is_flag=True, help="Small shapes and no timing: for compute-sanitizer.")
def main(checkpoint: Path | None, json_path: Path, seconds: int, quick: bool) -> None:
    """Check and time every CUDA backend on the first GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA GPU")
    deadline = time.monotonic() + seconds
    checks: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(DEVICE),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(DEVICE))),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "checks": checks,
    }
    click.echo(f"{report['gpu']}, compute capability {report['capability']}, torch {report['torch']}")

    for dtype, weights in product((torch.bfloat16, torch.float16), (None, fp8.DTYPE)):
        for shape in SMALL_SHAPES if quick else (*SMALL_SHAPES, *SHAPES_7B):
            if time.monotonic() < deadline:
                layer = random_layer(*shape, dtype, weights)
                guarded(lambda layer=layer: check_backends(layer), f"{layer.name} {dtype}", checks)
        for shape in ((136, 192), (1000, 1024)):
            if cutlass.unavailable(DEVICE, weights or dtype, *shape) is None and time.monotonic() < deadline:
                layer = random_layer(*shape, dtype, weights)
                guarded(lambda layer=layer: check_tiles(layer), f"tiles {layer.name} {dtype}", checks)
    if checkpoint:
        for layer in real_layers(checkpoint):
            guarded(lambda layer=layer: check_backends(layer), layer.name, checks)
    for weights in (None, fp8.DTYPE):
        guarded(lambda w=weights: check_graphs(random_layer(1000, 1024, torch.bfloat16, w)), "CUDA graph", checks)
    failed = sum(row.get("ok") is False for row in checks)
    click.echo(f"{sum('ok' in row for row in checks)} checks, {failed} failed")
    for reason in sorted({f"{row['backend']}: {row['skipped']}" for row in checks if "skipped" in row}):
        click.echo(f"not run: {reason}")

    def save() -> None:
        json_path.write_text(json.dumps(report, indent=1))

    save()
    if not quick:
        report["limits"] = limits = gpu_timing.measure_limits(DEVICE)
        report["times"] = times = []
        click.echo(gpu_timing.HEADER)
        rows = gpu_timing.time_backends(BACKENDS[:3], limits, deadline)
        if cutlass.unavailable(DEVICE, fp8.DTYPE, 4096, 4096) is None:
            rows = chain(rows, gpu_timing.time_fp8(limits, deadline))
        for row in rows:
            times.append(row)
            click.echo(gpu_timing.line(row))
            save()
        if cutlass.unavailable(DEVICE, torch.bfloat16, 4096, 4096) is None:
            report["tiles"] = tiles = []
            for row in gpu_timing.time_tiles(deadline):
                tiles.append(row)
                save()
            click.echo(gpu_timing.table_rows(tiles))
    save()
    click.echo(f"wrote {json_path}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

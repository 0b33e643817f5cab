"""`make test-gpu`, or `python -m benchmarks.gpu_check`: checks and times every GPU kernel.

Needs torch and this package, not vLLM. Prints one table and writes one JSON file. The most important work comes first,
in case a run is cut short: correctness against float64, CUDA graphs, times beside the dense product and the hardware's
limits, and last the times of every tile, which fill the table MEASURED in serve/kernels/cuda/tiles.py.

The work is divided into parts, which a worker process runs one by one. A part that fails, crashes or hangs ends its
worker, because after an illegal memory access nothing in that process can be trusted. A new worker continues with the
next part.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from benchmarks import gpu_products, gpu_tiles, gpu_timing
from benchmarks.gpu_report import Report
from benchmarks.gpu_timing import DEVICE, Row
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.kernels.base import LinearKernel, LinearLayerConfig
from ria_vllm.serve.kernels.cuda import architectures
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.cuda.bindings import library_of
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.kernels.torch.cusparselt import CusparseltKernel

# The kernels for GPUs, ours and torch's; a new one belongs here.
FAST: tuple[type[LinearKernel], ...] = (CutlassKernel, CusparseltKernel)
KERNELS: tuple[type[LinearKernel], ...] = (*FAST, ReferenceKernel)
NARROW = {FP8_DTYPE: "fp8", torch.int8: "int8"}
SMALL_SHAPES = ((64, 64), (136, 192), (1000, 576))
SHAPES_7B = ((4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096))
TILE_SHAPES = ((136, 192), (1000, 1024))
GRAPH_SHAPE = (1024, 1024)
START = 90  # seconds that a worker may take to start, including the import of torch
GRACE = 30  # seconds that a part may run beyond the deadline
OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Part:
    """A unit of work that may fail without harm to the others.

    Attributes:
        section: the key in the JSON file under which its rows go.
        rows: yields those rows, and before each step a row with the key `at` alone that names the step.
        silence: seconds without a row after which the part counts as hung.
        tries_limit: it does what is documented not to work. If it hangs or crashes, that is its result, not a failure.
    """

    name: str
    section: str
    rows: Callable[[], Iterator[Row]]
    silence: float = 20
    tries_limit: bool = False


@dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        checkpoint: folder whose weights are checked too.
        quick: small shapes and no timing.
        only_ours: none of torch's kernels.
        tokens: of the products that are checked; None: the usual numbers.
    """

    checkpoint: Path | None = None
    quick: bool = False
    only_ours: bool = False
    tokens: tuple[int, ...] | None = None


def parts_of(options: Options) -> list[Part]:
    """All parts for this GPU, the most important first."""
    shapes = SMALL_SHAPES if options.quick else (*SMALL_SHAPES, *SHAPES_7B)
    dtypes = (torch.bfloat16, torch.float16)
    checks = [part for dtype in dtypes for part in _checks(options, shapes, dtype, None)]
    if options.checkpoint:
        for kernel in KERNELS:
            rows = partial(_on_checkpoint, kernel, options.checkpoint)
            checks.append(Part(f"real weights {kernel.name}", "checks", rows))
    fp8_checks, int8_checks = (
        [part for dtype in dtypes for part in _checks(options, shapes, dtype, weights)] for weights in NARROW
    )
    if options.quick:
        return checks + fp8_checks + int8_checks
    return checks + _timings() + fp8_checks + int8_checks + _our_timings() + _limits()


def _checks(
    options: Options, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, weights: torch.dtype | None
) -> list[Part]:
    fast, tokens = ((CutlassKernel,) if options.only_ours else FAST), options.tokens
    kernels = fast if options.only_ours else KERNELS
    kind = f"{dtype} with {NARROW[weights]} weights" if weights else str(dtype)

    def part(name: str, check: Callable[[gpu_products.Layer], Iterator[Row]], sizes: Sequence[tuple[int, int]]) -> Part:
        return Part(f"{name} {kind}", "checks", partial(_on_layers, check, sizes, dtype, weights))

    parts = [part(kernel.name, partial(gpu_products.check_kernel, kernel, tokens=tokens), shapes) for kernel in kernels]
    if reason_against_ours(dtype, gpu_timing.FORMATS.get(weights, FLOAT), *TILE_SHAPES[0]) is None:
        parts.append(part("packing", gpu_products.check_packing, TILE_SHAPES))
        if not options.quick:
            parts.append(Part(f"experts {kind}", "checks", partial(gpu_products.check_experts, dtype, weights)))
        for name in library_of(DEVICE.index).tile_names:
            parts.append(part(f"tile {name}", partial(gpu_products.check_tile, name, tokens=tokens), TILE_SHAPES))
    for kernel in fast:
        for name, check in (("CUDA graph", gpu_products.check_graphs), ("two streams", gpu_products.check_streams)):
            parts.append(part(f"{name} {kernel.name}", partial(check, kernel, tokens=tokens), (GRAPH_SHAPE,)))
    return parts


def _limits() -> list[Part]:
    if reason_against_ours(torch.bfloat16, FLOAT, *GRAPH_SHAPE) is not None:
        return []
    rows = partial(_on_layers, gpu_products.try_concurrent, (GRAPH_SHAPE,), torch.bfloat16, None)
    return [Part("concurrent streams", "concurrent", rows, tries_limit=True)]


def _timings() -> list[Part]:
    parts = [Part("limits", "limits", gpu_timing.measure_limits)]
    for kernel, shape in product(FAST, gpu_timing.SHAPES):
        rows = partial(gpu_timing.time_kernel, kernel, shape)
        parts.append(Part(f"times {kernel.name} {shape}", "times", rows))
    return parts


def _our_timings() -> list[Part]:
    formats = gpu_timing.FORMATS
    served = [d for d, one in formats.items() if reason_against_ours(torch.bfloat16, one, 4096, 4096) is None]
    parts = []
    for dtype, shape in product(NARROW, gpu_timing.SHAPES):
        if dtype in served:
            rows = partial(gpu_timing.time_narrow, shape, dtype)
            parts.append(Part(f"times {NARROW[dtype]} {shape}", "times", rows))
    if torch.bfloat16 in served:
        parts.append(Part("packing times", "packing", gpu_timing.time_packing))
        parts.append(Part("gather times", "gather", gpu_timing.time_gather, silence=90))
    for shape, dtype in product(gpu_tiles.TUNED_SHAPES, served):
        for name in gpu_tiles.names_for(dtype):
            rows = partial(gpu_tiles.time_tile, name, shape, dtype)
            parts.append(Part(gpu_tiles.part_name(shape, dtype, name), "tiles", rows))
    return parts


def _on_layers(
    check: Callable[[gpu_products.Layer], Iterator[Row]],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    weights: torch.dtype | None,
) -> Iterator[Row]:
    return chain.from_iterable(check(gpu_products.random_layer(*shape, dtype, weights)) for shape in shapes)


def _on_checkpoint(kernel: type[LinearKernel], folder: Path) -> Iterator[Row]:
    for layer in gpu_products.real_layers(folder):
        yield from gpu_products.check_kernel(kernel, layer)


def run_parts(parts: Sequence[Part], deadline: float, first: int = 0) -> Iterator[tuple[int, Row]]:
    """(index of the part, row) for all parts from `first` on, run in this process. An error ends the run."""
    for index, part in enumerate(parts[first:], first):
        for row in chain([{"at": "its start"}], part.rows()):
            if "at" in row and time.monotonic() > deadline:
                yield index, {"part": part.name, "skipped": OUT_OF_TIME}
                break
            yield index, row


def supervise(factory: Callable[[], Sequence[Part]], deadline: float) -> Iterator[tuple[int, Row]]:
    """The same in worker processes. A part that fails, crashes or hangs yields a row that is not `ok`; the rest runs.

    Args:
        factory: returns the same parts in every process; picklable.
    """
    parts, first = factory(), 0
    while first < len(parts):
        if time.monotonic() > deadline:
            yield from run_parts(parts, deadline, first)
            return
        index, at = first, "the worker's start"
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(sender, factory, deadline, first))
        worker.start()
        sender.close()
        try:
            for index, row in _received(worker, receiver, parts, deadline + GRACE, is_first=first == 0):
                at = row.get("at", at)
                yield index, row
            return
        except _PartError as error:
            row = {"part": parts[index].name, "at": at}
            if time.monotonic() > deadline + GRACE:
                yield index, row | {"skipped": OUT_OF_TIME, "error": str(error)}
            else:
                yield index, row | {"error": str(error)} | ({} if parts[index].tries_limit else {"ok": False})
        finally:
            worker.kill()
            worker.join(10)
        first = index + 1


class _PartError(Exception):
    """What ended a worker."""


def _received(
    worker: BaseProcess, receiver: Connection, parts: Sequence[Part], end: float, is_first: bool
) -> Iterator[tuple[int, Row]]:
    # On a fresh machine, a run's first result waits for torch's libraries and kernels from a cold disk.
    patience, is_cold = float(START), is_first
    while receiver.poll(min(patience, max(0.0, end - time.monotonic()))):
        try:
            received = receiver.recv()
        except EOFError:
            worker.join()
            raise _PartError(f"the process ended with code {worker.exitcode}") from None
        if received is None:
            worker.join(5)  # no longer: it may take minutes to end, or hang
            return
        index, row = received
        if "error" in row:
            raise _PartError(row["error"])
        yield index, row
        is_cold = is_cold and "at" in row
        patience = max(START, parts[index].silence) if is_cold else parts[index].silence
    raise _PartError(f"no answer for {patience} s, or the run's time is over")


def _work(sender: Connection, factory: Callable[[], Sequence[Part]], deadline: float, first: int) -> None:
    index = first
    try:
        for index, row in run_parts(factory(), deadline, first):
            sender.send((index, row))
        sender.send(None)
    except Exception as error:  # any error must reach the JSON file
        sender.send((index, {"error": f"{type(error).__name__}: {error}".splitlines()[0]}))
        raise


def reason_against_ours(dtype: torch.dtype, weight_format: WeightFormat, rows: int, columns: int) -> str | None:
    """Why our own kernel cannot serve a layer on this GPU, or None."""
    rounded = gpu_timing.config_of(rows, columns, weight_format).input_dtype
    config = LinearLayerConfig(DEVICE, dtype, weight_format, rows, columns, rounded)
    return CutlassKernel.is_supported(DEVICE) or CutlassKernel.can_implement(config)


def check_library() -> Iterator[Row]:
    """A failed row if our own kernels cannot run on a GPU that they support; else a row that names missing tiles."""
    if torch.version.hip or architectures.for_capability(*torch.cuda.get_device_capability(DEVICE)) is None:
        return
    if reason := reason_against_ours(torch.bfloat16, FLOAT, 4096, 4096):
        yield {"part": "our own kernels", "ok": False, "error": reason}
        return
    library = library_of(DEVICE.index)
    if absent := architectures.missing_tiles(library.path.name, library.tile_names):
        reason = f"{', '.join(absent)}: `ria-vllm build-kernels --tiles all` compiles them"
        yield {"part": "tiles", "skipped": reason}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time every GPU kernel on the first GPU.")
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint whose weights are checked too")
    parser.add_argument("--json", type=Path, help="file for results (gpu_check.json; --quick: gpu_check_quick.json)")
    parser.add_argument("--seconds", type=float, default=400, help="start no new work after this time (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes in one process, for compute-sanitizer")
    arguments = parser.parse_args()
    if arguments.checkpoint and not arguments.checkpoint.is_dir():
        parser.error(f"{arguments.checkpoint} is not a folder")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Check and time; exit with status 1 if anything failed."""
    deadline = float("inf") if arguments.quick else time.monotonic() + arguments.seconds
    factory = partial(parts_of, Options(arguments.checkpoint, arguments.quick))
    report = Report(arguments.json or Path("gpu_check_quick.json" if arguments.quick else "gpu_check.json"))
    for row in check_library():
        report.add("checks", row)
    parts = factory()
    for index, row in run_parts(parts, deadline) if arguments.quick else supervise(factory, deadline):
        report.add(parts[index].section, row)
    report.conclude()
    if report.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run(parse_arguments())

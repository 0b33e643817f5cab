"""The CPU kernel against vLLM's dense linears on the same machine: `python -m benchmarks.cpu_kernels`.

The dense baselines are bfloat16, float32, W4A16 (int4 weights with a scale for 128 columns, or for 64 where the
columns are no multiple of 128) and W8A8 (int8 weights; each call quantizes its activations), each built by vLLM's own
code. W4A16 is left out with `--limit`, and where vLLM does not have it: on x86 without AVX-512. Our kernel runs in
bfloat16, in float32, with int8 and int4 weights, the latter with scales for as many columns, and with activations that
it quantizes to int8 itself: W8A8 and W4A8. Every speedup names the baseline that was the fastest for that shape and
number of tokens.

All variants take turns in one process, and medians are compared. Each variant cycles through copies of its weight that
together exceed every cache, as the layers of a model do. The sparse variants include an activation permutation. Each
number of threads gets a process of its own, because vLLM's oneDNN reads that number only when it starts.
"""

import argparse
import json
import math
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import cpu_dense
from benchmarks.cpu_dense import Linear
from ria_vllm.format.formats import FLOAT, INT8, IntFormat
from ria_vllm.format.weight_format import Parts, WeightFormat
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, instruction_set

SHAPES = {  # out x in
    "SmolLM2 o": (576, 576),
    "SmolLM2 gate_up": (3072, 576),
    "SmolLM2 down": (576, 1536),
    "Llama-3.2-1B o": (2048, 2048),
    "Llama-3.2-1B gate_up": (16384, 2048),
    "Llama-3.2-1B down": (2048, 8192),
    "Llama-2-7B o": (4096, 4096),
    "Llama-2-7B gate": (11008, 4096),
    "Llama-2-7B down": (4096, 11008),
}
QUICK_SHAPES = ["SmolLM2 gate_up", "Llama-3.2-1B down", "Llama-2-7B o"]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
ROTATED_BYTES = 96 << 20
# A dense baseline that is this many times slower than the fastest one is measured only twice.
SLOW_FACTOR = 4
DENSE = ("bfloat16", "float32", "W8A8", "W4A16")
SPARSE = ("bfloat16", "float32", "int8", "int4", "W8A8", "W4A8")
# The dense baseline that ours is meant for: of the same precision, or for W4A8, which vLLM does not have, bfloat16.
COUNTERPART = {"bfloat16": "bfloat16", "float32": "float32", "int8": "W8A8", "int4": "W4A16", "W8A8": "W8A8",
               "W4A8": "bfloat16"}  # fmt: skip


def sparse(
    parts: Parts, weight_format: WeightFormat, act_dtype: torch.dtype, input_dtype: torch.dtype | None = None
) -> Linear:
    """Our kernel, with an input permutation."""
    out_features, in_features = parts["bitmask"].shape[0], parts["bitmask"].shape[1] * 8
    config = LinearLayerConfig(torch.device("cpu"), act_dtype, weight_format, out_features, in_features, input_dtype)
    packed = CpuKernel.pack(config, parts)
    permutation = torch.randperm(in_features, dtype=torch.int32)
    return lambda x: CpuKernel.apply(config, x, packed, permutation, None)


BFLOAT16_SETS = ("amx", "avx512_bf16")
"""Instruction sets that multiply bfloat16."""


def fast_dtype() -> torch.dtype:
    """The dtype to serve a model in on this machine: bfloat16 where the CPU has instructions for it."""
    return torch.bfloat16 if instruction_set() in BFLOAT16_SETS else torch.float32


def variants_of(weight: torch.Tensor) -> dict[tuple[str, str], tuple[torch.dtype, list[Linear]]]:
    """Linears with `weight`, float32 [out, in]: ("dense" or "sparse", kind) -> (dtype of activations, copies)."""

    def copies(make: Callable[[], Linear], bits: float) -> list[Linear]:
        return [make() for _ in range(max(2, math.ceil(8 * ROTATED_BYTES / (weight.numel() * bits))))]

    variants = {}
    for dtype in (torch.bfloat16, torch.float32):
        name, bits, same = str(dtype).removeprefix("torch."), 8 * dtype.itemsize, weight.to(dtype)
        parts = FLOAT.encode(same, None, None)
        variants["dense", name] = dtype, copies(partial(lambda one: cpu_dense.unquantized(one.clone()), same), bits)
        variants["sparse", name] = (
            dtype,
            copies(partial(sparse, parts, FLOAT, dtype), FLOAT.bits_per_weight(dtype)),
        )
    group_size = math.gcd(weight.shape[1], 128)
    for name, integers in (("int8", INT8), ("int4", IntFormat(4, group_size))):
        rounded, scales = integers.quantize(weight, torch.bfloat16)
        parts, bits = integers.encode(rounded, None, scales), integers.bits_per_weight(torch.bfloat16)
        variants["sparse", name] = (
            torch.bfloat16,
            copies(partial(sparse, parts, integers, torch.bfloat16), bits),
        )
    if not cpu_dense.w4a16_left_out():
        variants["dense", "W4A16"] = torch.bfloat16, copies(lambda: cpu_dense.w4a16(weight, group_size), 4)
    dtype = fast_dtype()
    for name, integers in (("W8A8", INT8), ("W4A8", IntFormat(4, group_size))):
        rounded, scales = integers.quantize(weight, torch.float32)
        parts, bits = integers.encode(rounded, None, scales), integers.bits_per_weight(torch.bfloat16)
        variants["sparse", name] = (
            dtype,
            copies(partial(sparse, parts, integers, dtype, torch.int8), bits),
        )
    variants["dense", "W8A8"] = dtype, copies(lambda: cpu_dense.w8a8(weight, dtype), 8)
    return variants


def clock() -> float:
    """Wall-clock seconds; with one thread its processor time, which other processes on the machine disturb less."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def read_bandwidth() -> float:
    """Bytes per second of reading 512 MiB in huge pages: the fastest of several sums and dot products."""
    buffer = mmap.mmap(-1, 512 << 20)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(buffer, dtype=torch.float32).fill_(1.0)
    seconds = []
    for _ in range(6):
        for read in (data.sum, lambda: torch.dot(data, data)):
            start = clock()
            read()
            seconds.append(clock() - start)
    return data.nbytes / min(seconds)


def medians(
    variants: dict[tuple[str, str], tuple[torch.dtype, list[Linear]]], x: torch.Tensor, budget: float, least: int
) -> dict[tuple[str, str], float]:
    """Median seconds that each variant takes on `x`, float32 [tokens, in].

    The variants take turns, each with its next copy, for `budget` seconds and at least `least` turns after a warm-up.
    """
    inputs = {dtype: x.to(dtype) for dtype, _ in variants.values()}
    samples: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    start = time.perf_counter()
    turn = 0
    while turn < least + 1 or time.perf_counter() - start < budget:
        dense = [min(seconds) for (side, _), seconds in samples.items() if side == "dense" and seconds]
        for variant, (dtype, calls) in variants.items():
            if turn > 1 and variant[0] == "dense" and min(samples[variant]) > SLOW_FACTOR * min(dense):
                continue
            begin = clock()
            calls[turn % len(calls)](inputs[dtype])
            samples[variant].append(clock() - begin)
        turn += 1
    return {variant: statistics.median(seconds[1:]) for variant, seconds in samples.items()}


def measure(names: list[str], tokens: list[int], budget: float) -> dict:
    """Measurements of every shape and number of tokens with this process's threads; prints each at once."""
    threads = torch.get_num_threads()
    bandwidth = read_bandwidth()
    limit = cpu_dense.limit()
    limited = f", limited to {limit}" if limit else ""
    print(f"{threads} thread(s){limited}: streaming read {bandwidth / 1e9:.1f} GB/s", flush=True)
    if reason := cpu_dense.w4a16_left_out():
        print(f"dense W4A16 left out: {reason}", flush=True)
    rows = []
    for name in names:
        out_features, in_features = SHAPES[name]
        variants = variants_of(torch.randn(out_features, in_features))
        for m in tokens:
            seconds = medians(variants, torch.randn(m, in_features), budget, least=5)
            row = {
                "name": name,
                "out_features": out_features,
                "in_features": in_features,
                "threads": threads,
                "tokens": m,
                "dense_seconds": {kind: seconds["dense", kind] for kind in DENSE if ("dense", kind) in seconds},
                "sparse_seconds": {kind: seconds["sparse", kind] for kind in SPARSE},
            }
            rows.append(row)
            print(describe(row, bandwidth), flush=True)
        del variants
    return {
        "machine": platform.processor() or platform.machine(),
        "limit": limit,
        "torch": torch.__version__,
        "instruction_set": instruction_set(),
        "read_bandwidth": {str(threads): bandwidth},
        "rows": rows,
    }


def best_dense(row: dict) -> str:
    """The fastest dense baseline for a row's shape and number of tokens."""
    return min(row["dense_seconds"], key=row["dense_seconds"].get)


def speedup(row: dict, ours: str, dense: str) -> float:
    """Seconds of the dense baseline / seconds of our kernel."""
    return row["dense_seconds"][dense] / row["sparse_seconds"][ours]


def has_counterpart(row: dict, ours: str) -> bool:
    """Whether the dense baseline that ours is meant for was measured."""
    return COUNTERPART[ours] in row["dense_seconds"]


def measure_each(threads: list[int], limits: dict[str, str], arguments: list[str]) -> dict:
    """The merged measurements of one process for each number of threads, pinned to cores as vLLM pins its own."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for count in threads:
            path = Path(folder) / f"{count}.json"
            pinned = {"OMP_NUM_THREADS": str(count), "OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
            command = [sys.executable, "-m", __spec__.name, *arguments, "--one-process", "--json", str(path)]
            subprocess.run(command, env={**os.environ, **limits, **pinned}, check=True)
            results.append(json.loads(path.read_text()))
    merged = results[0]
    for result in results[1:]:
        merged["read_bandwidth"] |= result["read_bandwidth"]
        merged["rows"] += result["rows"]
    merged["rows"].sort(key=lambda row: list(SHAPES).index(row["name"]))
    return merged


def describe(row: dict, bandwidth: float) -> str:
    best, m = best_dense(row), row["tokens"]
    dense = "  ".join(f"{kind} {seconds * 1e3:.3f}" for kind, seconds in row["dense_seconds"].items())
    ours = []
    for kind, seconds in row["sparse_seconds"].items():
        counterpart = ""
        if has_counterpart(row, kind):
            counterpart = f", {speedup(row, kind, COUNTERPART[kind]):.2f}x {COUNTERPART[kind]}"
        ours.append(f"{kind} {seconds * 1e3:.3f} ({speedup(row, kind, best):.2f}x best{counterpart})")
    note = ""
    if m == 1:
        read = row["out_features"] * row["in_features"] * FLOAT.bits_per_weight(torch.bfloat16) / 8
        note = f"  bfloat16 at {read / row['sparse_seconds']['bfloat16'] / bandwidth:.0%} of read bandwidth"
    return (
        f"{row['name']:22s} {row['out_features']:5d}x{row['in_features']:<5d} {row['threads']} thr  M={m:<5d}"
        f" dense ms: {dense}, best {best}; ours ms: {'  '.join(ours)}{note}"
    )


def table(result: dict, ours: str, dense: str | None = None) -> str:
    """A Markdown table of speedups with a row for each shape and number of threads.

    Args:
        ours: one of SPARSE.
        dense: the baseline, one of DENSE that was measured; None for the fastest one, which is then named beside
            each speedup.
    """
    tokens = sorted({row["tokens"] for row in result["rows"]})
    lines = [
        "| linear (out x in) | threads | " + " | ".join(f"M={m}" for m in tokens) + " |",
        "| --- | --- | " + " | ".join("---" for _ in tokens) + " |",
    ]
    cells: dict[tuple, dict[int, str]] = {}
    for row in result["rows"]:
        key = (f"{row['name']} ({row['out_features']} x {row['in_features']})", row["threads"])
        best = best_dense(row)
        cell = f"{speedup(row, ours, dense):.2f}" if dense else f"{speedup(row, ours, best):.2f} ({best})"
        cells.setdefault(key, {})[row["tokens"]] = cell
    for (name, threads), by_tokens in cells.items():
        lines.append(f"| {name} | {threads} | " + " | ".join(by_tokens[m] for m in tokens) + " |")
    return "\n".join(lines)


def tables(result: dict) -> str:
    """All tables of a result in Markdown, each under its title."""
    parts = []
    for ours in SPARSE:
        parts.append(f"Ours in {ours} against the fastest dense baseline:\n\n{table(result, ours)}")
        if all(has_counterpart(row, ours) for row in result["rows"]):
            dense = COUNTERPART[ours]
            parts.append(f"Ours in {ours} against dense {dense}:\n\n{table(result, ours, dense)}")
    return "\n\n".join(parts)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = "bfloat16" if result["instruction_set"] in BFLOAT16_SETS else "float32"
    threads = sorted({row["threads"] for row in result["rows"]})
    figure, axes = plt.subplots(1, len(threads), figsize=(6 * len(threads), 4.2), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], threads, strict=True):
        for name in dict.fromkeys(row["name"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["name"] == name and row["threads"] == count]
            speedups = [speedup(row, ours, best_dense(row)) for row in rows]
            axis.plot([row["tokens"] for row in rows], speedups, marker="o", label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_title(f"{count} thread" + "s" * (count > 1))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"fastest dense time / sparse time in {ours}")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cpu_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three shapes and fewer numbers of tokens")
    shapes_help = f"linears to measure: {', '.join(SHAPES)}"
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=shapes_help)
    parser.add_argument("--tokens", nargs="+", type=int, help="numbers of tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--budget", type=float, help="seconds for each measurement")
    parser.add_argument("--limit", choices=cpu_dense.LIMITS, help="newest instructions that any variant may use")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--plot", type=Path, help="write a plot here (needs matplotlib)")
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.shapes or (QUICK_SHAPES if options.quick else list(SHAPES))
    tokens = options.tokens or ([1, 4, 8, 16, 32, 128, 512] if options.quick else TOKENS)
    budget = options.budget or (0.15 if options.quick else 0.4)
    if options.one_process:
        torch.manual_seed(0)
        result = measure(names, tokens, budget)
    else:
        arguments = ["--shapes", *names, "--tokens", *map(str, tokens), "--budget", str(budget)]
        limits = cpu_dense.LIMITS[options.limit] if options.limit else {}
        result = measure_each(options.threads, limits, arguments)
        print(f"\n{tables(result)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()

"""The CPU kernel against the dense linear that vLLM uses on the same machine: `python -m ria_vllm.serve.kernels.bench`.

Both sides run in turn in one process and the medians are compared. Each side walks through copies of its weight that
together are larger than any cache, as the layers of a model do. The sparse side pays for an activation permutation.
Each number of threads has a process of its own: vLLM's oneDNN counts them when it starts and not again.
"""

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from ria_vllm import sparse24
from ria_vllm.serve.kernels import cpu

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
TARGETS = {1: 1.7, 2: 1.7, 4: 1.6, 8: 1.35, 16: 1.3, 32: 1.15}
LARGER_TARGET = 1.2
ROTATED_BYTES = 96 << 20
TABLES = {
    "Dense time / our time": "ratio",
    "Dense time / our time with int8 weights": "int8_ratio",
    "zentorch's dense time / our time": "zentorch_ratio",
}


def dense_onednn(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    from vllm import _custom_ops as ops

    handler = ops.create_onednn_mm(weight.t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def dense_zentorch(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = torch.ops.zentorch.zentorch_weight_prepack_for_linear(weight)
    return lambda x: torch.ops.zentorch.zentorch_linear_unary(x, packed, None, is_weight_prepacked=True)


def sparse(compressed: torch.Tensor, bitmask: torch.Tensor, *scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    out_features = compressed.shape[0]
    packed = cpu.pack(compressed, bitmask, *scales)
    permutation = torch.randperm(compressed.shape[1] * 2, dtype=torch.int32)
    return lambda x: cpu.apply(x, packed, out_features, permutation, None)


def read_bandwidth() -> float:
    """Bytes per second of reading a large buffer in huge pages once, the fastest of two ways and several tries."""
    buffer = mmap.mmap(-1, 512 << 20)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(buffer, dtype=torch.float32).fill_(1.0)
    seconds = []
    for _ in range(6):
        for read in (data.sum, lambda: torch.dot(data, data)):
            start = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def medians(
    sides: list[list[Callable[[torch.Tensor], torch.Tensor]]], x: torch.Tensor, budget: float, least: int
) -> list[float]:
    """Median seconds of each side's call on `x`, the sides in turn, each walking through its copies of the weight."""
    samples: list[list[float]] = [[] for _ in sides]
    start = time.perf_counter()
    turn = 0
    while turn < least + 1 or time.perf_counter() - start < budget:
        for side, taken in zip(sides, samples, strict=True):
            call = side[turn % len(side)]
            begin = time.perf_counter()
            call(x)
            taken.append(time.perf_counter() - begin)
        turn += 1
    return [statistics.median(taken[1:]) for taken in samples]


def measure(names: list[str], tokens: list[int], budget: float) -> dict:
    """Every shape and number of tokens, with the threads this process has."""
    zentorch = find_spec("zentorch") is not None
    if zentorch:
        import_module("zentorch")  # registers its operators
    threads = torch.get_num_threads()
    bandwidth = read_bandwidth()
    print(f"{threads} thread(s): streaming read {bandwidth / 1e9:.1f} GB/s", flush=True)
    rows = []
    for name in names:
        out_features, in_features = SHAPES[name]
        weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
        packed_bytes = cpu.packed_bytes(out_features, in_features, torch.bfloat16)
        copies = max(2, -(-ROTATED_BYTES // packed_bytes))
        pair = sparse24.compress(weight)
        values, scale = sparse24.quantize_rows(pair[0])
        int8 = (values, pair[1], scale[:, 0])
        sides = [[dense_onednn(weight) for _ in range(copies)], [sparse(*pair) for _ in range(copies)]]
        sides.append([sparse(*int8) for _ in range(2 * copies)])
        if zentorch:
            sides.append([dense_zentorch(weight) for _ in range(copies)])
        for m in tokens:
            x = torch.randn(m, in_features, dtype=torch.bfloat16)
            dense_seconds, sparse_seconds, int8_seconds, *others = medians(sides, x, budget, least=5)
            flop = 2 * m * out_features * in_features
            row = {
                "name": name,
                "out_features": out_features,
                "in_features": in_features,
                "threads": threads,
                "tokens": m,
                "dense_seconds": dense_seconds,
                "sparse_seconds": sparse_seconds,
                "ratio": dense_seconds / sparse_seconds,
                "int8_seconds": int8_seconds,
                "int8_ratio": dense_seconds / int8_seconds,
                "gflops": flop / sparse_seconds / 1e9,
                "dense_gflops": flop / dense_seconds / 1e9,
                "read_fraction": packed_bytes / sparse_seconds / bandwidth,
            }
            if others:
                row["zentorch_seconds"] = others[0]
                row["zentorch_ratio"] = others[0] / sparse_seconds
            rows.append(row)
            print(describe(row), flush=True)
        del sides
    return {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "instruction_set": cpu.instruction_set(),
        "read_bandwidth": {str(threads): bandwidth},
        "rows": rows,
    }


def measure_each(threads: list[int], arguments: list[str]) -> dict:
    """The measurements of one process per number of threads, pinned to cores as vLLM pins its own, put together."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for count in threads:
            path = Path(folder) / f"{count}.json"
            pinned = {"OMP_NUM_THREADS": str(count), "OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
            command = [sys.executable, "-m", __spec__.name, *arguments, "--one-process", "--json", str(path)]
            subprocess.run(command, env={**os.environ, **pinned}, check=True)
            results.append(json.loads(path.read_text()))
    merged = results[0]
    for result in results[1:]:
        merged["read_bandwidth"] |= result["read_bandwidth"]
        merged["rows"] += result["rows"]
    merged["rows"].sort(key=lambda row: list(SHAPES).index(row["name"]))
    return merged


def describe(row: dict) -> str:
    target = TARGETS.get(row["tokens"], LARGER_TARGET)
    zentorch = f"  zentorch/ours {row['zentorch_ratio']:5.2f}" if "zentorch_ratio" in row else ""
    note = ""
    if row["tokens"] == 1:
        note = f"  {row['read_fraction']:.0%} of read bandwidth"
    elif row["tokens"] >= 512:
        note = f"  {row['gflops']:.0f} GFLOP/s dense-equivalent (dense {row['dense_gflops']:.0f})"
    return (
        f"{row['name']:22s} {row['out_features']:5d}x{row['in_features']:<5d} {row['threads']} thr  M={row['tokens']:<5d}"
        f" dense {row['dense_seconds'] * 1e3:9.3f} ms  ours {row['sparse_seconds'] * 1e3:9.3f} ms"
        f"  ratio {row['ratio']:5.2f} {'  ' if row['ratio'] >= target else '<' + str(target)}"
        f"  int8 {row['int8_ratio']:5.2f}{zentorch}{note}"
    )


def table(result: dict, ratio: str = "ratio") -> str:
    """Dense time / our time, one line per shape and thread count (Markdown); `ratio` names the column of a row."""
    tokens = sorted({row["tokens"] for row in result["rows"]})
    lines = [
        "| linear (out x in) | threads | " + " | ".join(f"M={m}" for m in tokens) + " |",
        "| --- | --- | " + " | ".join("---" for _ in tokens) + " |",
    ]
    ratios: dict[tuple, dict[int, float]] = {}
    for row in result["rows"]:
        key = (f"{row['name']} ({row['out_features']} x {row['in_features']})", row["threads"])
        ratios.setdefault(key, {})[row["tokens"]] = row[ratio]
    for (name, threads), by_tokens in ratios.items():
        lines.append(f"| {name} | {threads} | " + " | ".join(f"{by_tokens[m]:.2f}" for m in tokens) + " |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = sorted({row["threads"] for row in result["rows"]})
    figure, axes = plt.subplots(1, len(threads), figsize=(6 * len(threads), 4.2), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], threads, strict=True):
        for name in dict.fromkeys(row["name"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["name"] == name and row["threads"] == count]
            axis.plot([row["tokens"] for row in rows], [row["ratio"] for row in rows], marker="o", label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_title(f"{count} thread" + "s" * (count > 1))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("dense time / 2:4 time")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes, few token counts, under a minute")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=f"of: {', '.join(SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--budget", type=float, help="seconds per measurement")
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
        result = measure_each(options.threads, arguments)
        for title, ratio in TABLES.items():
            if all(ratio in row for row in result["rows"]):
                print(f"\n{title}\n\n{table(result, ratio)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()

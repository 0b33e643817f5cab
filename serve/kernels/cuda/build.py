"""Compiles the CUDA libraries: one `_cuda_ARCH.so` per architecture, with nvcc and CUTLASS's headers alone.

Imports nothing but the standard library: setup.py loads this file by its path, before the package or torch exist.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
CUTLASS_PACKAGE = "nvidia-cutlass==4.2.0"
LATER = "later: `ria-vllm build-kernels --arch ARCH` (80, 90a, 100a or 120)"
GIBIBYTE = 2**30


class CudaBuildError(Exception):
    """nvcc or the headers are missing, or a file does not compile; the message says what to do."""


@dataclass(frozen=True)
class Tile:
    """One instantiation of a kernel: its name at run time, the macros that its source file asks for, and the bits of
    the values that it multiplies. A candidate is taken by no rule, only where a measurement says so."""

    name: str
    source: str
    macros: dict[str, int]
    value_bits: int = 16
    candidate: bool = False


@dataclass(frozen=True)
class Architecture:
    """family: which metadata layout and kernels (metadata.h). memory: what the compiler needs for one tile, measured."""

    name: str
    family: int
    code: str
    memory: int
    tiles: tuple[Tile, ...]

    @property
    def library(self) -> str:
        return f"_cuda_sm{self.name}.so"

    @property
    def default_tiles(self) -> tuple[Tile, ...]:
        return tuple(tile for tile in self.tiles if not tile.candidate)

    @property
    def small_tiles(self) -> tuple[Tile, ...]:
        """The first tile for each width of values: enough to compute every product."""
        first = {tile.value_bits: tile for tile in reversed(self.tiles)}
        return tuple(tile for tile in self.tiles if first[tile.value_bits] is tile)


def _tile_3x(
    m: int, n: int, cluster: int = 1, pingpong: bool = False, stream_k: bool = False, fp8: bool = False,
    candidate: bool = False,
) -> Tile:
    name = ("fp8_" if fp8 else "") + f"{m}x{n}" + ("_cluster" if cluster > 1 else "")
    name += ("_pingpong" if pingpong else "") + ("_streamk" if stream_k else "")
    macros = {"TILE_M": m, "TILE_N": n, "CLUSTER_M": cluster, "PINGPONG": pingpong, "STREAM_K": stream_k, "FP8": fp8}
    plain = {key: int(value) for key, value in macros.items()}
    return Tile(name, "sparse_gemm_3x.cu", plain, 8 if fp8 else 16, candidate)


def _tile_2x(m: int, n: int, warp_m: int, warp_n: int, stages: int) -> Tile:
    macros = {"TILE_M": m, "TILE_N": n, "WARP_M": warp_m, "WARP_N": warp_n, "STAGES": stages}
    return Tile(f"{m}x{n}", "sparse_gemm_2x.cu", macros)


# m counts out-features, n tokens. The first of each list is in the small set, which the tests compile.
_HOPPER = (
    _tile_3x(128, 16, stream_k=True),
    _tile_3x(64, 16, pingpong=True, candidate=True),
    _tile_3x(128, 64, stream_k=True),
    _tile_3x(128, 128, cluster=2, stream_k=True),
    _tile_3x(128, 128, cluster=2, pingpong=True, candidate=True),
    _tile_3x(128, 256, cluster=2),
    _tile_3x(256, 128, cluster=2, candidate=True),
)
# Widths of 128 tokens at most: fp8 sums are kept twice (sparse_gemm_3x.cu), and wider ones leave no registers.
_HOPPER_FP8 = (
    _tile_3x(128, 16, stream_k=True, fp8=True),
    _tile_3x(128, 128, cluster=2, stream_k=True, fp8=True),
)
_BLACKWELL = (
    _tile_3x(128, 64, stream_k=True),
    _tile_3x(128, 128, stream_k=True),
    _tile_3x(128, 256),
)
_MMA_SYNC = (
    _tile_2x(128, 32, 32, 32, 6),
    _tile_2x(128, 64, 64, 32, 4),
    _tile_2x(128, 128, 64, 64, 3),
)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("80", 80, "-gencode=arch=compute_80,code=sm_80", 1 * GIBIBYTE, _MMA_SYNC),
        Architecture("90a", 90, "-gencode=arch=compute_90a,code=sm_90a", 6 * GIBIBYTE, _HOPPER + _HOPPER_FP8),
        Architecture("100a", 100, "-gencode=arch=compute_100a,code=sm_100a", 6 * GIBIBYTE, _BLACKWELL),
        Architecture("120", 80, "-gencode=arch=compute_120,code=sm_120", 1 * GIBIBYTE, _MMA_SYNC),
    )
}
_SAME_BINARY = {"86": "80", "87": "80", "89": "80", "90": "90a", "100": "100a", "120a": "120", "121": "120"}


def architecture(name: str) -> Architecture:
    """By the name a user would write: 90a, sm_90a, 9.0, 86 (Ampere and Ada share one binary).

    Raises:
        CudaBuildError: no kernels for it.
    """
    plain = name.strip().lower().removeprefix("sm_").removeprefix("compute_").replace(".", "")
    found = ARCHITECTURES.get(_SAME_BINARY.get(plain, plain))
    if found is None:
        raise CudaBuildError(f"no kernels for CUDA architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    return found


def for_capability(major: int, minor: int) -> Architecture | None:
    """What serves a GPU of this compute capability; None if nothing does."""
    exact = {(9, 0): "90a", (10, 0): "100a"}
    name = exact.get((major, minor)) or {8: "80", 12: "120"}.get(major)
    return ARCHITECTURES[name] if name else None


def absent_tiles(library: str, present: Sequence[str]) -> list[str]:
    """Tiles that a library of this file name could have and has not."""
    tiles = [tile.name for found in ARCHITECTURES.values() if found.library == library for tile in found.tiles]
    return [name for name in tiles if name not in present]


def find_nvcc() -> str:
    """CUDA_HOME's nvcc, the one on the path, or that of the PyPI package nvidia-cuda-nvcc.

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
    raise CudaBuildError("no nvcc: not in CUDA_HOME, not on the path, no PyPI package nvidia-cuda-nvcc")


def find_headers() -> Path:
    """CUTLASS's include folder: RIA_VLLM_CUTLASS (a checkout or the include folder), or the package nvidia-cutlass.

    Raises:
        CudaBuildError: there is none.
    """
    named = os.environ.get("RIA_VLLM_CUTLASS")
    roots = [Path(named), Path(named) / "include"] if named else []
    if not named:
        # pip builds in an isolated environment that hides the installed packages from find_spec, not from purelib.
        package = find_spec("cutlass_library")
        folders = [*(package.submodule_search_locations or ())] if package else []
        folders.append(os.path.join(sysconfig.get_path("purelib"), "cutlass_library"))
        roots = [Path(folder) / "source" / "include" for folder in folders]
    for root in roots:
        if (root / "cutlass" / "version.h").exists() and (root / "cute" / "tensor.hpp").exists():
            return root
    if named:
        raise CudaBuildError(f"RIA_VLLM_CUTLASS={named} holds no CUTLASS headers (cutlass/version.h, cute/tensor.hpp)")
    raise CudaBuildError(f"no CUTLASS headers: pip install {CUTLASS_PACKAGE}, or name a copy with RIA_VLLM_CUTLASS")


def jobs_for(memory: int) -> int:
    """As many compilers at once as there are cores and memory for; RIA_VLLM_CUDA_JOBS overrides."""
    if "RIA_VLLM_CUDA_JOBS" in os.environ:
        return max(1, int(os.environ["RIA_VLLM_CUDA_JOBS"]))
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        available = 0
    return max(1, min(os.cpu_count() or 1, available // memory))


def compile_library(
    target: Architecture,
    folder: Path,
    tiles: Sequence[Tile] | None = None,
    say: Callable[[str], None] = print,
    jobs: int | None = None,
) -> Path:
    """Compiles one architecture's library into `folder` and returns its path; the file appears only when complete.

    Args:
        tiles: None for all that the rules choose from; the library serves with any of them, at less speed.
        jobs: compilers at once; None decides by cores and memory.

    Raises:
        CudaBuildError: see the message.
    """
    tiles = target.default_tiles if tiles is None else tiles
    with tempfile.TemporaryDirectory(prefix="ria-cuda-") as scratch:
        objects = compile_objects(target, Path(scratch), tiles, say, jobs)
        return link(target, objects, folder)


def compile_objects(
    target: Architecture,
    folder: Path,
    tiles: Sequence[Tile],
    say: Callable[[str], None] = print,
    jobs: int | None = None,
) -> list[Path]:
    """Compiles what a library consists of into `folder`, one object file a tile and one for the interface.

    Raises:
        CudaBuildError: see the message.
    """
    nvcc, headers = find_nvcc(), find_headers()
    common = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--cudart=static", target.code]
    common += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{headers}", f"-I{SOURCES}", f"-DRIA_FAMILY={target.family}"]
    units = [("library", [str(SOURCES / "library.cu")])]
    for tile in tiles:
        macros = [f"-DRIA_{name}={value}" for name, value in tile.macros.items()]
        units.append((tile.name, [*macros, f'-DRIA_TILE_NAME="{tile.name}"', str(SOURCES / tile.source)]))

    def compile_unit(unit: tuple[str, list[str]]) -> Path:
        name, arguments = unit
        output = folder / f"{name}.o"
        _run([*common, *arguments, "-c", "-o", str(output)], f"sm_{target.name} {name}")
        say(f"compiled sm_{target.name} {name}")
        return output

    # The longest first.
    with ThreadPoolExecutor(jobs or jobs_for(target.memory)) as pool:
        return list(pool.map(compile_unit, reversed(units)))


def link(target: Architecture, objects: Sequence[Path], folder: Path) -> Path:
    """The library of these objects in `folder`, which appears only when complete.

    Raises:
        CudaBuildError: see the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / target.library
    part = finished.with_suffix(f".{os.getpid()}.part")
    try:
        command = [find_nvcc(), "-shared", "--cudart=static", target.code, *map(str, objects), "-o", str(part)]
        _run(command, "linking")
        part.replace(finished)
    finally:
        part.unlink(missing_ok=True)
    return finished


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise CudaBuildError(f"{what} failed (exit {done.returncode}; 137 or a killed cicc means memory):\n{errors}")


def visible_architectures() -> list[Architecture]:
    """What the GPUs that nvidia-smi sees need; empty without a GPU or a driver."""
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


def at_install(folder: Path, say: Callable[[str], None] = print) -> list[Path]:
    """What `pip install` does: the visible GPU's library, or those of RIA_VLLM_CUDA_ARCHS. Never fails the install.

    RIA_VLLM_CUDA=0 skips it. Without GPU and request nothing is compiled, so that CPU machines install quickly.
    """
    if os.environ.get("RIA_VLLM_CUDA") == "0":
        say("ria-vllm: CUDA kernels skipped, RIA_VLLM_CUDA=0")
        return []
    try:
        asked = os.environ.get("RIA_VLLM_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
        targets = [architecture(name) for name in asked] or visible_architectures()
        if not targets:
            say(f"ria-vllm: CUDA kernels skipped, no GPU visible and RIA_VLLM_CUDA_ARCHS unset; {LATER}")
            return []
        return [compile_library(target, folder, say=say) for target in targets]
    except (CudaBuildError, OSError, ValueError) as error:
        say(f"ria-vllm: CUDA kernels skipped: {' '.join(str(error).split())[:300]}; {LATER}")
        return []

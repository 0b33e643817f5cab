"""What must travel with a checkout to a machine that has CUDA, torch and no network. Part of gpu_session."""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sanitizer import SANITIZER_PACKAGE
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import Architecture, CudaBuildError

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / ".work" / "gpu"
LIMIT = 60 * 2**20  # bytes
MANIFEST = "manifest.json"
PACKAGES = ("benchmarks", "ria_vllm", "serve")  # of a checkout: what a session imports


def sources_hash(target: Architecture) -> str:
    """SHA-256 of what the library of all tiles is compiled from: our sources, CUTLASS's version, the options."""
    digest = hashlib.sha256()
    for path in [Path(build.__file__), *sorted(build.SOURCES.iterdir())]:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(
        repr(
            (build.CUTLASS_PACKAGE, target.gencode, [(tile.name, tile.source, tile.macros) for tile in target.tiles])
        ).encode()
    )
    return digest.hexdigest()


def reason_against(folder: Path, target: Architecture) -> str | None:
    """Why the bundle in `folder` does not serve this checkout, or None."""
    again = "; run `python -m benchmarks.gpu_session pack` where there is nvcc"
    if not (folder / target.library).exists():
        return f"there is no {target.library} in {folder}{again}"
    packed = _manifest(folder)
    if packed.get("sources") != sources_hash(target):
        return f"{target.library} in {folder} was not packed from the sources of this checkout{again}"
    for name, digest in packed["files"].items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            return f"{name} in {folder} is not as it was packed: copy the folder again"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    """What `pack` wrote: the hash of the sources, CUDA's version, and the SHA-256 of each file; or empty."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):  # no manifest, or a part of one
        found = {}
    return found if isinstance(found, dict) and found.keys() == {"sources", "cuda", "files"} else {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(folder: Path, target: Architecture, cuda: str) -> None:
    files = {path.name: _digest(path) for path in _files(folder) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"sources": sources_hash(target), "cuda": cuda, "files": files}))


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []


def cuda_version() -> str:
    """Of the compiler: what the driver has to know.

    Raises:
        CudaBuildError: there is none.
    """
    said = subprocess.run([build.find_nvcc(), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "of this nvcc"


def needs(folder: Path, target: Architecture) -> list[str]:
    """What a machine with the GPU must have, in lines; of the bundle in `folder` also what is wrong with it."""
    cuda = _manifest(folder).get("cuda", "of the nvcc that packs the bundle")
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    files = ", ".join(f"{path.name} ({path.stat().st_size / 2**20:.1f} MiB)" for path in _files(folder))
    return [
        f"GPU:     one of sm_{target.name}, to yourself; Linux on {platform.machine()}",
        f"driver:  one that knows CUDA {cuda} or newer: `nvidia-smi` shows which",
        f"Python:  {'.'.join(map(str, sys.version_info[:2]))} or a neighbour, with torch for CUDA (here "
        f"{torch.__version__}); no other package, no network",
        "also:    a C compiler and Python.h for torch.compile; without, `decode` times uncompiled layers and says so",
        f"bundle:  {reason_against(folder, target) or f'{files}: as it was packed, and from these sources'}",
        f"copy:    tar czf gpu.tgz {' '.join(PACKAGES)} {place}; there: tar xzf gpu.tgz",
    ]


def pack(folder: Path, target: Architecture) -> None:
    """Compile all tiles unless they are there, add compute-sanitizer, and list the files and their sizes.

    Raises:
        RiaError: a tile does not compile, or the files take more than LIMIT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cuda = _manifest(folder).get("cuda")
    if reason_against(folder, target) is not None:
        try:
            cuda = cuda_version()
            library = build.compile_library(target, folder, target.tiles)
        except CudaBuildError as error:
            raise RiaError(str(error)) from error
        if strip := shutil.which("strip"):
            subprocess.run([strip, "--strip-unneeded", str(library)], check=True)
    if not any(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), SANITIZER_PACKAGE]
        if subprocess.run(command).returncode:
            print("compute-sanitizer was not downloaded: the machine's CUDA toolkit must have it")
    write_manifest(folder, target, str(cuda))
    sizes = {path.name: path.stat().st_size for path in _files(folder)}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:7.2f} MiB  in {folder}")
    if sum(sizes.values()) > LIMIT:
        raise RiaError(f"the bundle is larger than {LIMIT // 2**20} MiB")

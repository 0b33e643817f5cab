"""What must travel with a checkout to a machine that has CUDA, torch and no network. Part of gpu_session."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_sanitizer import SANITIZER_PACKAGE
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import Architecture, CudaBuildError

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / ".work" / "gpu"
LIMIT = 60 * 2**20  # bytes
MANIFEST = "manifest.json"


def sources_hash(target: Architecture) -> str:
    """SHA-256 of what the library of all tiles is compiled from: our sources, CUTLASS's version, the options."""
    digest = hashlib.sha256()
    for path in sorted(build.SOURCES.iterdir()):
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
    try:
        packed = json.loads((folder / MANIFEST).read_text()).get("sources")
    except (OSError, ValueError):  # no manifest, or a part of one
        packed = None
    if packed != sources_hash(target):
        return f"{target.library} in {folder} was not packed from the sources of this checkout{again}"
    return None


def pack(folder: Path, target: Architecture) -> None:
    """Compile all tiles unless they are there, add compute-sanitizer, and list the files and their sizes.

    Raises:
        RiaError: a tile does not compile, or the files take more than LIMIT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if reason_against(folder, target) is not None:
        try:
            library = build.compile_library(target, folder, target.tiles)
        except CudaBuildError as error:
            raise RiaError(str(error)) from error
        if strip := shutil.which("strip"):
            subprocess.run([strip, "--strip-unneeded", str(library)], check=True)
        (folder / MANIFEST).write_text(json.dumps({"sources": sources_hash(target)}))
    if not any(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), SANITIZER_PACKAGE]
        if subprocess.run(command).returncode:
            print("compute-sanitizer was not downloaded: the machine's CUDA toolkit must have it")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:7.2f} MiB  in {folder}")
    if sum(sizes.values()) > LIMIT:
        raise RiaError(f"the bundle is larger than {LIMIT // 2**20} MiB")

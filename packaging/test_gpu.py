"""`make test-gpu`: checks and times the CUDA kernels of this checkout under whatever torch the machine has.

The machine's Python needs torch and nothing else, and nothing is installed into it. If there is an nvcc, kernels that
are not compiled yet are compiled first; CUTLASS's headers are downloaded into .work if the machine has none.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT))

import torch

from benchmarks import gpu_check
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import CudaBuildError, for_capability
from ria_vllm.serve.kernels.cuda.bindings import library_folder, library_of


def has_headers() -> bool:
    try:
        build.find_headers()
    except CudaBuildError:
        return False
    return True


def provide_headers() -> None:
    if has_headers():
        return
    folder = ROOT / ".work" / "cutlass"
    os.environ["RIA_VLLM_CUTLASS"] = str(folder / "cutlass_library" / "source")
    if not has_headers():
        package = build.CUTLASS_PACKAGE
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), package]
        subprocess.run(command, check=True)


def provide_library() -> None:
    """Compile all tiles for the first GPU, or the default ones if not all compile; keep a library of these sources."""
    target = for_capability(*torch.cuda.get_device_capability(0))
    if target is None or torch.version.hip:
        return
    try:
        library_of(0)
        return
    except RiaError as error:
        print(error, flush=True)
    try:
        build.find_nvcc()
        provide_headers()
    except (CudaBuildError, subprocess.CalledProcessError) as error:
        print(f"not compiled: {error}", flush=True)
        return
    for tiles in (target.tiles, target.default_tiles):
        try:
            print(f"compiling {len(tiles)} kernels for sm_{target.name}, this takes minutes", flush=True)
            build.compile_library(target, library_folder(), tiles)
            return
        except (CudaBuildError, OSError, ValueError) as error:
            print(f"not compiled: {error}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--provide-library"]:
        provide_library()
    else:
        arguments = gpu_check.parse_arguments()
        # In a process of its own: a library that turns out to be stale stays loaded in the process that tried it.
        subprocess.run([sys.executable, __file__, "--provide-library"], check=False)
        gpu_check.run(arguments)

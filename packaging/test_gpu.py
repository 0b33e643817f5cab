"""`make test-gpu`: checks and times the CUDA kernels of this checkout under whatever torch the machine has.

Nothing is installed into the machine's Python and nothing but torch is needed in it. Kernels that were not compiled yet
are, where there is an nvcc; CUTLASS's headers are fetched into .work if the machine has none.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUTLASS = "nvidia-cutlass==4.2.0"

# As pyproject.toml maps it: `serve/` is ria_vllm.serve.
sys.path.insert(0, str(ROOT))
import ria_vllm

ria_vllm.__path__.append(str(ROOT))

import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels import cuda_compile, gpu_check
from ria_vllm.serve.kernels.cuda_library import library_folder, library_of


def provide_headers() -> None:
    try:
        cuda_compile.find_headers()
    except cuda_compile.CudaBuildError:
        folder = ROOT / ".work" / "cutlass"
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), CUTLASS]
            subprocess.run(command, check=True)
        os.environ["RIA_VLLM_CUTLASS"] = str(folder / "cutlass_library" / "source")


def provide_library() -> None:
    """All tiles for the first GPU, unless a library of these sources is there."""
    target = cuda_compile.for_capability(*torch.cuda.get_device_capability(0))
    if target is None:
        return
    try:
        library_of(0)
        return
    except RiaError as error:
        print(error, flush=True)
    try:
        cuda_compile.find_nvcc()
        provide_headers()
        print(f"compiling the kernels for sm_{target.name}, some minutes", flush=True)
        cuda_compile.compile_library(target, library_folder(), target.tiles)
    except (cuda_compile.CudaBuildError, subprocess.CalledProcessError) as error:
        print(f"not compiled: {error}", flush=True)


if __name__ == "__main__":
    if torch.cuda.is_available():
        provide_library()
    gpu_check.main()

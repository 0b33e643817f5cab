"""CUDA libraries for the tests, compiled once a run: no GPU needed, but nvcc and CUTLASS's headers."""

import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

from ria_vllm.serve.kernels import cuda_compile
from ria_vllm.serve.kernels.cuda_library import CudaLibrary, load

# Compiled without tiles: Blackwell's takes another minute and tests nothing that Hopper's do not.
BARE = ("100a",)

_folder = tempfile.TemporaryDirectory(prefix="ria-cuda-tests-")


def compiled(arch: str) -> CudaLibrary:
    """The architecture's library with its small set of tiles; skips the test where it cannot be compiled."""
    try:
        cuda_compile.find_nvcc()
        cuda_compile.find_headers()
    except cuda_compile.CudaBuildError as error:
        pytest.skip(str(error))
    return _compile(arch)


@lru_cache
def _compile(arch: str) -> CudaLibrary:
    target = cuda_compile.architecture(arch)
    return load(cuda_compile.compile_library(target, Path(_folder.name), () if arch in BARE else target.small_tiles))

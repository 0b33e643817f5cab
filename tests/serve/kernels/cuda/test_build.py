"""The CUDA build: what it compiles at installation, and what it says when it cannot."""

import pytest

from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import CudaBuildError, find_architecture


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"RIA_VLLM_CUDA": "0"}, "RIA_VLLM_CUDA=0"),
        ({}, "no GPU visible"),
        ({"RIA_VLLM_CUDA_ARCHS": "75"}, "no kernels for CUDA architecture '75'"),
        ({"RIA_VLLM_CUDA_ARCHS": "90a", "RIA_VLLM_CUTLASS": "/nowhere"}, "/nowhere has no CUTLASS headers"),
    ],
)
def test_an_install_that_builds_nothing_says_why_in_one_line(no_gpu, tmp_path, variables, reason):
    no_gpu.setattr(build, "find_nvcc", lambda: "nvcc")
    for name, value in variables.items():
        no_gpu.setenv(name, value)
    lines = []
    assert build.at_install(tmp_path, lines.append) == []
    assert len(lines) == 1 and reason in lines[0] and "\n" not in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_is_quoted_and_leaves_nothing(no_gpu, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'metadata.h: unlucky' >&2\nexit 1\n")
    compiler.chmod(0o755)
    no_gpu.setattr(build, "find_nvcc", lambda: str(compiler))
    no_gpu.setattr(build, "find_headers", lambda: tmp_path)
    with pytest.raises(CudaBuildError, match="unlucky"):
        build.compile_library(find_architecture("80"), tmp_path / "out")
    no_gpu.setenv("RIA_VLLM_CUDA_ARCHS", "80")
    lines = []
    assert build.at_install(tmp_path / "out", lines.append) == []
    assert len(lines) == 1 and "unlucky" in lines[0] and "\n" not in lines[0]
    assert not list(tmp_path.glob("out/*"))

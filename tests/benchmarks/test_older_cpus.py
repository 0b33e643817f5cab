"""The benchmarks of the CPU kernels on CPUs for which vLLM's library has not all operators."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import cpu_dense

ROOT = Path(__file__).parents[2]
NO_W4A16 = "dense W4A16 left out: vLLM's library for this CPU has no cpu_gemm_wna16\n"
NO_FUSED_EXPERTS = (
    "dense fused_experts_cpu left out: "
    "vLLM's library for this CPU has no convert_weight_packed and no fused_experts_cpu\n"
)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_an_operator_is_missing_where_no_library_of_vllm_defines_it():
    names = ("cpu_gemm_wna16", "convert_weight_packed", "fused_experts_cpu", "onednn_mm")
    missing = [name for name in names if cpu_dense.missing(name)]
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = [Path(path).read_bytes() for path in {line.split()[-1] for line in maps if "/vllm/_C" in line}]
    assert libraries
    assert missing == [name for name in names if not any(f"{name}(Tensor".encode() in data for data in libraries)]


@pytest.mark.slow
def test_vllms_library_for_avx2_is_measured():
    """vLLM loads it where Python is told that there is no AVX-512."""
    library = next(Path(find_spec("vllm").origin).parent.glob("_C_AVX2*.so"), None)
    if library is None or b"cpu_gemm_wna16(Tensor" in library.read_bytes():
        pytest.skip("this vLLM has no library without W4A16")
    code = """
import torch
torch.cpu._is_avx512_supported = torch.cpu._is_amx_tile_supported = lambda: False
from benchmarks import cpu_experts, cpu_kernels
cpu_kernels.SHAPES, cpu_kernels.ROTATED_BYTES = {"small": (64, 128)}, 1
cpu_kernels.read_bandwidth = lambda: 1e9
cpu_experts.SHAPES = {"small": (4, 64, 64, 2)}
linears = cpu_kernels.measure(["small"], [3], 0.0)["rows"]
experts = cpu_experts.measure(["small"], ["bfloat16"], [3], 0.0)
print(*linears[0]["dense_seconds"], *experts[0]["seconds"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert NO_W4A16 in done.stdout and NO_FUSED_EXPERTS in done.stdout
    assert done.stdout.splitlines()[-1] == "bfloat16 float32 W8A8 ours cpu_fused_moe"

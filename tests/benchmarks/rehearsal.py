"""`python rehearsal.py MODULE ARGUMENTS`: a module of `benchmarks` as on a machine with a Hopper and a bare torch.

The kernels are mocked on the CPU. Worker processes execute this file too, and so get the same mocks.
"""

import importlib
import sys

ABSENT = ("pydantic", "vllm", "transformers", "safetensors", "click", "scipy", "datasets", "rich", "psutil", "numpy")
sys.modules.update(dict.fromkeys(ABSENT))

import pretend_hopper
import pytest
import small_gpu

from benchmarks import gpu_sanitizer

patch = pytest.MonkeyPatch()
library = pretend_hopper.PretendLibrary()
operators = pretend_hopper.let_operators_take_cpu_tensors()
pretend_hopper.put(patch, library)
pretend_hopper.treat_cpu_as_gpu(patch)
small_gpu.use_library(patch, library)
small_gpu.make_small(patch)
patch.setattr(gpu_sanitizer, "TOOLS", ("memcheck",))

if __name__ == "__main__":
    module = importlib.import_module(sys.argv.pop(1))
    raise SystemExit(module.main())

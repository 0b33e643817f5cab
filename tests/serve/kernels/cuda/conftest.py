import sys
from pathlib import Path

import pytest

from ria_vllm.serve.kernels.cuda import build

# The tests of this folder share how kernels are compiled and emulated.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU and without settings for the build; returns monkeypatch."""
    for name in ("RIA_VLLM_CUDA", "RIA_VLLM_CUDA_ARCHS", "RIA_VLLM_CUTLASS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "visible_architectures", lambda: [])
    return monkeypatch

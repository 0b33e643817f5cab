import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# The processes that the tests start import these modules too.
sys.path.insert(0, str(Path(__file__).parent))

from moe_paths import experts_path  # noqa: F401
from pretend_hopper import ampere_layers, cutlass_on_cpu, hopper, hopper_layers  # noqa: F401


@pytest.fixture
def engine():
    """A current configuration, which vLLM's layers ask for."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def ranks(engine, monkeypatch):
    """Call with (rank, size) to become that rank; at first, rank 0 of 1. vLLM's layers ask two functions for them."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.mamba import mamba_mixer2

    from ria_vllm.serve.load import load_report
    from ria_vllm.serve.model import int8_heads

    monkeypatch.setattr(int8_heads, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))

    def become(rank, size):
        for module in (linear, parameter, load_report, mamba_mixer2):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank, raising=False)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size, raising=False)

    become(0, 1)
    return become


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A compressed folder, which tests must not change."""
    import tiny

    folder = tmp_path_factory.mktemp("files") / "out"
    tiny.write(tiny.FAMILIES["llama-gqa"], folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of `checkpoint`, which a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "copy")

import sys
from pathlib import Path

import pytest
import torch

# The makers of small checkpoints are shared with the processes that the tests start.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def engine():
    """vLLM's layers look for the current configuration."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def ranks(engine, monkeypatch):
    """Call with (rank, size) to become that rank; the one of one to begin with. vLLM's layers ask by two functions."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.mamba import mamba_mixer2

    from ria_vllm.serve import load_report

    def become(rank, size):
        for module in (linear, parameter, load_report, mamba_mixer2):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank, raising=False)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size, raising=False)

    become(0, 1)
    return become


@pytest.fixture
def cutlass_on_cpu(monkeypatch):
    """Puts a library behind the backend `cutlass`, whose operators take tensors on the CPU while the test runs."""
    from ria_vllm.serve.kernels import cutlass

    def put(library, multiprocessors, workspace):
        monkeypatch.setattr(cutlass, "library_of", lambda index: library)
        monkeypatch.setattr(cutlass, "multiprocessors", lambda index: multiprocessors)
        monkeypatch.setattr(cutlass, "workspace", lambda index: workspace)

    registered = torch.library.Library("ria", "IMPL")
    registered.impl("sparse24_linear.cutlass", cutlass._linear, "CPU")
    registered.impl("sparse24_fp8_linear.cutlass", cutlass._fp8_linear, "CPU")
    yield put
    registered._destroy()


@pytest.fixture
def hopper(cutlass_on_cpu):
    """A stand-in for the compiled library of a Hopper, which also takes tensors on the CPU while the test runs."""
    from pretend_hopper import PretendLibrary

    library = PretendLibrary()
    cutlass_on_cpu(library, 132, torch.zeros(1, dtype=torch.uint8))
    return library


@pytest.fixture
def hopper_layers(hopper, monkeypatch):
    """The same, and layers on the CPU count as layers on the GPU."""
    from ria_vllm.serve.kernels import cutlass

    unavailable, gpu = cutlass.unavailable, torch.device("cuda", 0)
    monkeypatch.setattr(cutlass, "unavailable", lambda device, *facts: unavailable(gpu, *facts))
    return hopper

"""A fake GPU, a Hopper or an Ampere: `cutlass` with a library that computes products on the CPU, in float64."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ria_vllm.format import sparse24
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.serve.kernels.cpu.backend import CpuKernel
from ria_vllm.serve.kernels.cuda import backend as cutlass
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES

TILES = [tile.name for tile in ARCHITECTURES["90a"].tiles]


class PretendLibrary(SimpleNamespace):
    """Uses the bitmask as metadata; otherwise it has the interface of CudaLibrary."""

    path, family, tile_names = Path("pretend.so"), 90, TILES

    def __hash__(self) -> int:
        return id(self)

    def can_implement(self, tile, dtype, *_):
        narrow = {"fp8": FP8_DTYPE, "int8": torch.int8}.get(self.tile_names[tile].split("_")[0])
        return dtype == narrow if narrow else dtype.itemsize == 2

    def workspace_bytes(self, *_):
        return 0

    def metadata_bytes(self, out_features, in_features, value_bits=16):
        return out_features * in_features // 8

    def pack_metadata(self, bitmask, value_bits=16):
        self.packed_bits = value_bits
        columns = 16 if self.family == 80 and value_bits == 8 else 1  # bytes to whose multiples it is padded
        return torch.nn.functional.pad(bitmask, (0, -bitmask.shape[1] % columns), value=0x33)

    def linear(self, tile, split_k, x, values, metadata, bias, y, workspace, scales=None):
        self.used = self.tile_names[tile]
        stored = sparse24.decompress(values.double(), metadata.view(values.shape[0], -1))
        product = x.double() @ stored.T
        if scales is not None:
            product *= scales[0].double() * scales[1].double()[:, None]
        y.copy_(product if bias is None else product + bias.double())


def let_operators_take_cpu_tensors() -> torch.library.Library:
    """Until the returned object is destroyed."""
    registered = torch.library.Library("ria", "IMPL")
    registered.impl("sparse24_linear.cutlass", cutlass._linear, "CPU")
    return registered


def put(monkeypatch, library, num_sms=132, workspace=None):
    """Gives the kernel `cutlass` a library."""
    workspace = torch.zeros(1, dtype=torch.uint8) if workspace is None else workspace
    monkeypatch.setattr(cutlass, "_index", lambda device: 0)
    monkeypatch.setattr(cutlass, "library_of", lambda index: library)
    monkeypatch.setattr(cutlass, "num_sms_of", lambda index: num_sms)
    monkeypatch.setattr(cutlass, "workspace", lambda index: workspace)
    monkeypatch.setattr(cutlass, "workspaces", lambda index: (workspace,))


def treat_cpu_as_gpu(monkeypatch):
    """Layers on the CPU are treated as layers on the GPU."""
    monkeypatch.setattr(cutlass.CutlassKernel, "is_supported", staticmethod(lambda device: None))
    monkeypatch.setattr(CpuKernel, "is_supported", staticmethod(lambda device: "the layer is on cuda"))


@pytest.fixture
def cutlass_on_cpu(monkeypatch):
    """Gives the kernel `cutlass` a library, and lets its operators take tensors on the CPU while the test runs."""
    registered = let_operators_take_cpu_tensors()
    yield partial(put, monkeypatch)
    registered._destroy()


@pytest.fixture
def hopper(cutlass_on_cpu):
    """A stand-in for the compiled library of a Hopper, which takes tensors on the CPU."""
    library = PretendLibrary()
    cutlass_on_cpu(library)
    return library


@pytest.fixture
def ampere_layers(cutlass_on_cpu, monkeypatch):
    """A stand-in for the compiled library of an Ampere; layers on the CPU are treated as layers on the GPU."""
    library = PretendLibrary(family=80, tile_names=[tile.name for tile in ARCHITECTURES["80"].tiles])
    cutlass_on_cpu(library)
    treat_cpu_as_gpu(monkeypatch)
    return library


@pytest.fixture
def hopper_layers(hopper, monkeypatch):
    """The same, and layers on the CPU are treated as layers on the GPU."""
    treat_cpu_as_gpu(monkeypatch)
    return hopper

"""gpu_check and gpu_session on the CPU: the mock of a Hopper, small shapes, arbitrary times."""

import contextlib
import sys

import pytest
import torch

from benchmarks import gpu_check, gpu_decode, gpu_products, gpu_sanitizer, gpu_tiles, gpu_timing
from benchmarks.llama import Shape
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.kernels.torch.cusparselt import CusparseltKernel


class MockGraph:
    """Runs the calls again where a CUDA graph would be replayed."""

    def __init__(self, calls):
        self.calls, self.outputs = calls, [call() for call in calls]

    def replay(self):
        for call, output in zip(self.calls, self.outputs, strict=True):
            output.copy_(call())


class MockStream:
    """Notes which streams it waited for. `current` is the one in whose block the code is."""

    current = None

    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)

    @staticmethod
    @contextlib.contextmanager
    def block(stream):
        MockStream.current = stream
        yield
        MockStream.current = None


def use_library(monkeypatch, library):
    """The checks take layers on the CPU, and `library` as ours."""
    for module in (gpu_check, gpu_products, gpu_tiles, gpu_timing, gpu_decode):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    for module in (gpu_check, gpu_products, gpu_tiles):
        monkeypatch.setattr(module, "library_of", lambda index: library)
    for module in (gpu_products, gpu_tiles):
        monkeypatch.setattr(module, "num_sms_of", lambda index: 132)
    for name, value in (("Stream", MockStream), ("stream", MockStream.block), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timing, "capture", lambda calls: ((graph := MockGraph(calls)), graph.outputs))


def _microseconds(calls, least=8):
    return float(sum(call().shape[0] for call in calls))


def make_small(monkeypatch):
    for module, name, value in [
        (gpu_check, "FAST", (CutlassKernel, CusparseltKernel)),
        (gpu_check, "KERNELS", (CutlassKernel, CusparseltKernel, ReferenceKernel)),
        (gpu_check, "SMALL_SHAPES", ((64, 64), (136, 192))),
        (gpu_check, "SHAPES_7B", ((256, 128),)),
        (gpu_check, "TILE_SHAPES", ((136, 192),)),
        (gpu_check, "GRAPH_SHAPE", (128, 128)),
        (gpu_products, "TOKENS", (1, 33)),
        (gpu_products, "GRAPH_TOKENS", (1, 33)),
        (gpu_products, "TURNS", 4),
        (gpu_timing, "SHAPES", ((128, 64), (64, 128))),
        (gpu_tiles, "TUNED_SHAPES", ((192, 64),)),
        (gpu_tiles, "TUNED_TOKENS", (1, 64, 1024)),
        (gpu_timing, "LAYERS", {64: ((192, 64), (64, 128))}),
        (gpu_timing, "_BYTES_IN_TURN", 2**10),
        (gpu_timing, "microseconds", _microseconds),
        (gpu_tiles, "microseconds", _microseconds),
        (gpu_timing, "measure_limits", lambda: iter([{"bytes_per_second": 3e12, "dense_flop_per_second": 8e14}])),
        (gpu_sanitizer, "TOKENS", (1, 3)),
        (gpu_decode, "TOKENS", (1, 3)),
        (gpu_decode, "LAYERS", (Shape("one layer", 128, 256, 4, 2, 32, 1, 0, 16),)),
        (gpu_decode, "MODELS", (Shape("a model", 128, 192, 2, 1, 64, 2, 96, 16),)),
        (gpu_decode, "alternating", lambda calls: [float(call().numel() * (3 - i)) for i, call in enumerate(calls)]),
        (torch, "compile", lambda function, **options: function),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_name", lambda device: "mock"),
        (torch.cuda, "get_device_capability", lambda device: (9, 0)),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def mocked(hopper_layers, monkeypatch):
    use_library(monkeypatch, hopper_layers)
    return hopper_layers


@pytest.fixture
def small(mocked, monkeypatch, tmp_path):
    """All of it in this process."""
    make_small(monkeypatch)
    monkeypatch.setattr(gpu_check, "supervise", lambda factory, deadline: gpu_check.run_parts(factory(), deadline))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    return mocked

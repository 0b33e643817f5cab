"""Which kernel a layer gets, and that one is tried out before."""

from types import SimpleNamespace

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels import reference, registry
from ria_vllm.serve.kernels.cpu import backend as cpu
from ria_vllm.serve.kernels.cuda import backend as cutlass
from ria_vllm.serve.kernels.torch import cusparselt

CPU = torch.device("cpu")


class Backend(SimpleNamespace):
    """The reference, with changes."""

    def __init__(self, **changes):
        super().__init__(**{name: getattr(reference, name) for name in ("unavailable", "pack", "apply")} | changes)

    def __hash__(self):
        return id(self)


def test_a_backend_is_tried_out_before_it_is_chosen():
    def broken(*_):
        raise RuntimeError("no kernel image is available\nfor execution")

    assert registry.fault(cpu, CPU) is None and registry.fault(reference, CPU) is None
    assert registry.fault(Backend(pack=broken), CPU).endswith("fails on this GPU: no kernel image is available")
    assert registry.fault(Backend(apply=lambda x, *_: x), CPU) == "a small product comes out wrong on this GPU"


def test_the_next_backend_takes_what_a_broken_one_cannot(monkeypatch):
    gpu = torch.device("cuda", 0)
    for backend in registry.BACKENDS:
        monkeypatch.setattr(backend, "unavailable", lambda *facts: None)
    monkeypatch.setattr(registry, "fault", lambda backend, device: "too old" if backend is cutlass else None)
    assert registry.choose(gpu, torch.bfloat16, 64, 64) is cusparselt
    assert registry.explain(gpu, torch.bfloat16, 64, 64)[:2] == [("cutlass", "too old"), ("cusparselt", None)]
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cutlass")
    with pytest.raises(RiaError, match="cutlass cannot serve .* too old"):
        registry.choose(gpu, torch.bfloat16, 64, 64)

"""Who computes the experts of an MoE layer in the tests: the fixture `experts_path`."""

import pytest
import torch

from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel


@pytest.fixture(params=["vllm", "cpu", "reference"])
def experts_path(request, monkeypatch):
    """Who computes: vLLM's own experts, or a kernel of ours."""
    if request.param == "vllm":
        monkeypatch.setattr(registry, "EXPERTS_KERNELS", (ReferenceExpertsKernel,))  # too slow if vLLM has its own
    elif request.param == "reference":
        monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    return request.param


def close(got, want):
    assert want.std() > 0.3
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)  # float32 sums of up to 128 products

"""Our own CUDA kernel as far as a machine without a GPU can see it."""

from types import SimpleNamespace

import torch
from packed_layers import pack
from torch._inductor import metrics

from ria_vllm.format.formats import FLOAT
from ria_vllm.serve.kernels.cuda import backend
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel

GPU = torch.device("cuda", 0)


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend, "library_of", backend.library_of.__wrapped__)
    monkeypatch.setenv("RIA_VLLM_CUDA_FOLDER", str(tmp_path))
    reason = CutlassKernel.is_supported(GPU)
    assert "_cuda_sm90a.so was not built" in reason and "ria-vllm build-kernels --arch 90a" in reason


def test_products_on_several_streams_do_not_share_a_workspace(monkeypatch):
    """vLLM computes shared experts on another stream while the kernel for experts computes the routed ones."""
    whole = torch.zeros(backend.STREAMS, 16)
    monkeypatch.setattr(backend, "_used", {})
    monkeypatch.setattr(backend, "workspaces", lambda index: whole.unbind())

    def on(stream, device=0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=stream))
        return backend.workspace(device).data_ptr()

    first = {stream: on(stream) for stream in range(backend.STREAMS)}
    assert len(set(first.values())) == backend.STREAMS and on(1, device=1) == first[0]
    assert on(0) == first[0]
    assert on("captures a graph") == first[1] == on("captures a graph")
    assert on(0) == first[0] and on(1) == first[2]


def test_the_compiler_puts_the_gather_into_the_norm(hopper):
    """The operators leave it outside, so that it costs no pass of its own: no kernel more than without."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = pack(CutlassKernel, FLOAT.encode(weight, None, None))
    x, weight = torch.randn(3, 256).bfloat16(), torch.rand(256).bfloat16()
    p = torch.randperm(256).int()

    def layer(x, p):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        return product(normed.bfloat16() * weight, p)

    counts = []
    for permutation in (None, p):
        torch.compiler.reset()
        metrics.reset()
        y = torch.compile(layer)(x, permutation)
        torch.testing.assert_close(y, layer(x, permutation), rtol=0.02, atol=0.1)
        counts.append(metrics.generated_kernel_count)
    assert counts[0] == counts[1] > 0

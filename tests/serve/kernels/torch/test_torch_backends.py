"""The CUDA backends, as far as a machine without a GPU can test them."""

from types import SimpleNamespace

import pytest
import torch
from torch._inductor import metrics
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from ria_vllm import sparse24
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels import reference
from ria_vllm.serve.kernels import registry as kernels
from ria_vllm.serve.kernels.cpu import backend as cpu
from ria_vllm.serve.kernels.cuda import backend as cutlass
from ria_vllm.serve.kernels.torch import cusparselt, torch_cutlass

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (224, 192), (992, 448)])
def test_torch_cutlass_packs_as_torch_converts(dtype, shape):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    compressed, bitmask = sparse24.compress(dense)
    values, metadata = sparse_semi_structured_from_dense_cutlass(sparse24.decompress(compressed, bitmask))
    packed = torch_cutlass.pack(compressed, bitmask)
    assert torch.equal(packed[0], values) and torch.equal(packed[1], metadata)
    assert packed[0].data_ptr() != compressed.data_ptr()


def test_torch_cutlass_packs_no_metadata_that_the_hardware_forbids():
    bitmask = torch.arange(256, dtype=torch.uint8).repeat(32, 1)
    _, metadata = torch_cutlass.pack(torch.zeros(32, 1024, dtype=torch.bfloat16), bitmask)
    groups = metadata.view(torch.uint8)
    legal = {0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110}
    assert {int(byte) & 15 for byte in groups.flatten()} | {int(byte) >> 4 for byte in groups.flatten()} == legal


@pytest.mark.parametrize("backend", [cutlass, cusparselt, torch_cutlass])
def test_on_a_cpu_each_says_that_the_layer_is_not_on_a_gpu(backend):
    assert backend.unavailable(CPU, torch.bfloat16, 64, 64) == "the layer is on cpu"
    assert backend in kernels.BACKENDS


@pytest.mark.parametrize(
    "backend, sizes, reason",
    [
        (cutlass, (12, 64), "out-features 12"),
        (cutlass, (64, 96), "in-features 96"),
        (torch_cutlass, (40, 64), "out-features 40"),
        (cusparselt, (24, 64), "out-features 24"),
    ],
)
def test_a_size_that_does_not_fit_is_named(monkeypatch, backend, sizes, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert reason in backend.unavailable(torch.device("cuda", 0), torch.bfloat16, *sizes)


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cutlass, "num_sms_of", lambda index: 132)
    monkeypatch.setattr(cutlass, "library_of", cutlass.library_of.__wrapped__)
    monkeypatch.setenv("RIA_VLLM_CUDA_FOLDER", str(tmp_path))
    reason = cutlass.unavailable(torch.device("cuda", 0), torch.bfloat16, 64, 64)
    assert "_cuda_sm90a.so was not built" in reason and "ria-vllm build-kernels --arch 90a" in reason


def test_a_file_that_is_no_library_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("RIA_VLLM_CUDA_FOLDER", str(tmp_path))
    (tmp_path / "_cuda_sm90a.so").write_text("not a library")
    with pytest.raises(RiaError, match=r"_cuda_sm90a\.so does not load"):
        cutlass.library_of.__wrapped__(0)


@pytest.mark.parametrize("leading", [(3,), (2, 5), ()])
def test_shapes_for_the_compiler(leading):
    x = torch.empty(*leading, 128, dtype=torch.bfloat16, device="meta")
    values = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    metadata = torch.empty(64 * 16, dtype=torch.uint8, device="meta")
    order = torch.empty(128, dtype=torch.int32, device="meta")
    for backend, packed in [(cutlass, (values, metadata)), (torch_cutlass, (values, metadata)), (cusparselt, (values,))]:
        y = backend.apply(x, packed, 64, order, None)
        assert y.shape == (*leading, 64) and y.dtype == x.dtype


class Backend(SimpleNamespace):
    """The reference backend, with changes."""

    def __init__(self, **changes):
        super().__init__(**{name: getattr(reference, name) for name in ("unavailable", "pack", "apply")} | changes)

    def __hash__(self):
        return id(self)


def test_a_backend_is_tried_out_before_it_is_chosen():
    def broken(*_):
        raise RuntimeError("no kernel image is available\nfor execution")

    assert kernels.fault(cpu, CPU) is None and kernels.fault(reference, CPU) is None
    assert kernels.fault(Backend(pack=broken), CPU).endswith("fails on this GPU: no kernel image is available")
    assert kernels.fault(Backend(apply=lambda x, *_: x), CPU) == "a small product comes out wrong on this GPU"


def test_the_next_backend_takes_what_a_broken_one_cannot(monkeypatch):
    gpu = torch.device("cuda", 0)
    for backend in kernels.BACKENDS:
        monkeypatch.setattr(backend, "unavailable", lambda *facts: None)
    monkeypatch.setattr(kernels, "fault", lambda backend, device: "too old" if backend is cutlass else None)
    assert kernels.choose(gpu, torch.bfloat16, 64, 64) is cusparselt
    assert kernels.explain(gpu, torch.bfloat16, 64, 64)[:2] == [("cutlass", "too old"), ("cusparselt", None)]
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cutlass")
    with pytest.raises(RiaError, match="cutlass cannot serve .* too old"):
        kernels.choose(gpu, torch.bfloat16, 64, 64)


def test_the_compiler_puts_the_gather_into_the_norm(hopper):
    """The gather is outside the operators, so that torch.compile fuses it: there is no kernel more than without it."""
    compressed, bitmask = sparse24.compress(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16())
    packed = cutlass.pack(compressed, bitmask)
    x, weight = torch.randn(3, 256).bfloat16(), torch.rand(256).bfloat16()
    order = torch.randperm(256).int()

    def layer(x, order):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        return cutlass.apply(normed.bfloat16() * weight, packed, 64, order, None)

    counts = []
    for permutation in (None, order):
        torch.compiler.reset()
        metrics.reset()
        y = torch.compile(layer)(x, permutation)
        torch.testing.assert_close(y, layer(x, permutation), rtol=0.02, atol=0.1)
        counts.append(metrics.generated_kernel_count)
    assert counts[0] == counts[1] > 0

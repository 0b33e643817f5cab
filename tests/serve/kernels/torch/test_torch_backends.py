"""The CUDA backends as far as a machine without a GPU can see them."""

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
from ria_vllm.serve.kernels.cuda import build as cuda_compile
from ria_vllm.serve.kernels.cuda import tiles as cutlass_tiles
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
    monkeypatch.setattr(cutlass, "multiprocessors", lambda index: 132)
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


class PretendLibrary(SimpleNamespace):
    """Tiles by name; `refused` accept nothing, `hungry` want more than the workspace."""

    def __hash__(self) -> int:
        return id(self)

    def accepts(self, tile, *_):
        return self.tile_names[tile] not in self.refused

    def workspace_bytes(self, tile, *_):
        return cutlass_tiles.WORKSPACE_BYTES + (self.tile_names[tile] in self.hungry)


def pretend(names, refused=(), hungry=()):
    from pathlib import Path

    return PretendLibrary(tile_names=list(names), refused=refused, hungry=hungry, family=90, path=Path("pretend.so"))


ALL_HOPPER = [tile.name for tile in cuda_compile.ARCHITECTURES["90a"].tiles]


def chosen(library, tokens):
    tile, split = cutlass_tiles.choose_tile(library, torch.bfloat16, 4096, 4096, tokens, 132)
    return library.tile_names[tile], split


def test_more_tokens_take_wider_tiles():
    widths = [int(chosen(pretend(ALL_HOPPER), tokens)[0].split("_")[0].split("x")[1]) for tokens in (1, 16, 64, 256, 4096)]
    assert widths == sorted(widths) and widths[0] == 16 and widths[-1] == 256


def test_the_next_best_tile_serves_when_the_first_cannot():
    assert chosen(pretend(ALL_HOPPER, refused=("128x256_cluster",)), 4096)[0] == "128x128_cluster_streamk"
    assert chosen(pretend(ALL_HOPPER, hungry=("128x256_cluster",)), 4096)[0] == "128x128_cluster_streamk"
    assert chosen(pretend(ALL_HOPPER[:1]), 4096) == (ALL_HOPPER[0], cutlass_tiles.SPLIT_NONE)


@pytest.mark.parametrize("architecture", cuda_compile.ARCHITECTURES.values(), ids=lambda found: found.name)
def test_rules_and_measurements_take_what_is_compiled_by_default_and_nothing_else(architecture):
    taken = set()
    for (family, *_), rows in cutlass_tiles.MEASURED.items():
        taken |= {name for _, name, _ in rows if family == architecture.family}
    for (family, _), rules in cutlass_tiles._RULES.items():
        taken |= {name for _, tiles in rules for name, _ in tiles if family == architecture.family}
    assert taken == {tile.name for tile in architecture.default_tiles}


@pytest.mark.parametrize("sms", [114, 132, 148])
@pytest.mark.parametrize(
    "shape",
    [(4096, 4096), (6144, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672), (57344, 8192), (576, 1536)],
)
def test_parts_of_k_keep_the_multiprocessors_alike_busy(shape, sms):
    """Blocks are dealt out one by one to whoever has least; what the busiest gets is near an equal share."""
    parts = cutlass_tiles.balanced_parts("128x16_streamk", *shape, 1, sms)
    tiles, steps = -(-shape[0] // 128), -(-shape[1] // 128)
    loads = [0] * sms
    for part in range(parts):
        for _ in range(tiles):
            loads[loads.index(min(loads))] += (steps + part) // parts
    share = tiles * steps / sms
    assert max(loads) <= max(1.45 * share, steps / cutlass_tiles.MOST_PARTS + 3)


def test_k_stays_whole_where_a_tile_has_but_one_step():
    assert cutlass_tiles.balanced_parts("128x16_streamk", 8, 64, 1, 132) == 1
    assert cutlass_tiles.balanced_parts("fp8_128x16_streamk", 8, 256, 1, 132) == 1
    assert cutlass_tiles.balanced_parts("fp8_128x16_streamk", 8, 512, 1, 132) == 2


def test_no_tile_at_all_is_an_error():
    with pytest.raises(RiaError, match="no tile for a 4096 x 4096 layer"):
        chosen(pretend(ALL_HOPPER, refused=ALL_HOPPER), 1)


def test_a_measured_shape_overrules_the_rule(monkeypatch):
    row = ((16, "128x64_streamk", 2), (64, "128x128_cluster_pingpong", 1))
    monkeypatch.setitem(cutlass_tiles.MEASURED, (90, 132, 16, 4096, 4096), row)
    assert chosen(pretend(ALL_HOPPER), 7) == ("128x64_streamk", 2)
    assert chosen(pretend(ALL_HOPPER), 17) == ("128x128_cluster_pingpong", 1)
    assert chosen(pretend(ALL_HOPPER), 65)[0] == "128x128_cluster_streamk"


def test_every_rule_names_tiles_that_are_compiled():
    for target in cuda_compile.ARCHITECTURES.values():
        names = {tile.name for tile in target.tiles}
        for value_bits in {tile.value_bits for tile in target.tiles}:
            for tokens in (1, 16, 17, 64, 65, 512, 513, 100_000):
                wanted = cutlass_tiles.preferences(target.family, 132, value_bits, 4096, 4096, tokens)
                assert wanted and {name for name, _ in wanted} <= names


class Backend(SimpleNamespace):
    """The reference, with changes."""

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
    """The operators leave it outside, so that it costs no pass of its own: no kernel more than without."""
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

"""The compiled libraries, without a GPU: what they export, which products they accept, and which they refuse."""

import shutil
import subprocess

import pytest
import torch
from cuda_libraries import chosen_tiles, compiled

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import bindings
from ria_vllm.serve.kernels.cuda.tiles import DATA_PARALLEL, HEURISTIC, STREAM_K, WORKSPACE_BYTES, choose_tile

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_a_library_exports_its_interface_alone_and_needs_no_torch(arch):
    library = compiled(arch)
    assert sorted(library.tile_names) == sorted(tile.name for tile in chosen_tiles(arch))
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("no binutils")
    symbols = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-2] == "T"}
    ours = {name for name in exported if name.startswith("ria_")}
    assert {"ria_linear", "ria_pack_metadata", "ria_can_implement", "ria_num_tiles"} <= ours
    needed = subprocess.run(["readelf", "-d", library.path], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed and "libcudart" not in needed and "libcuda.so" not in needed


PRODUCTS = [
    ("80", 108, torch.bfloat16),
    ("80", 108, torch.int8),
    ("90a", 132, torch.float16),
    ("90a", 132, torch.float8_e4m3fn),
]


@pytest.mark.parametrize("arch, num_sms, dtype", PRODUCTS)
def test_the_kernels_accept_every_size_the_backend_promises(arch, num_sms, dtype):
    """CUTLASS's own host-side checks: alignment, strides, layouts of all four operands."""
    library = compiled(arch)
    tile, wider = tile_for(library, dtype), 2 if dtype == torch.int8 else 1  # int8 takes K in steps of 128
    for rows, columns in [(8, 64), (24, 192), (4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (1000, 576)]:
        for tokens in (1, 7, 16, 64, 333, 2048, 8191):
            for split_k in (STREAM_K, HEURISTIC, DATA_PARALLEL, 3):
                product = (rows, columns * wider), tokens, split_k
                assert library.can_implement(tile, dtype, *product, num_sms), product
    for rows, columns, tokens in [(12, 64, 1), (8, 96, 1), (8, 64, 0)]:
        product = (rows, columns * wider), tokens, DATA_PARALLEL
        assert not library.can_implement(tile, dtype, *product, num_sms), product


def test_no_sum_of_integers_leaves_32_bits():
    library = compiled("80")
    tile = tile_for(library, torch.int8)
    assert library.can_implement(tile, torch.int8, (8, 2**18), 1, DATA_PARALLEL, 108)
    assert not library.can_implement(tile, torch.int8, (8, 2**18 + 128), 1, DATA_PARALLEL, 108)


def tile_for(library, dtype):
    tile, _ = choose_tile(library, dtype, 4096, 4096, 1, 100)
    prefix = {torch.float8_e4m3fn: "fp8_", torch.int8: "int8_"}.get(dtype, "128x")
    assert library.tile_names[tile].startswith(prefix)
    return tile


@pytest.mark.parametrize("arch, num_sms, dtype", PRODUCTS)
def test_the_workspace_holds_whatever_is_chosen(arch, num_sms, dtype):
    library = compiled(arch)
    for out_features in (64, 576, 4096, 11008, 28672, 128256):
        for in_features in (128, 640, 4096, 8192, 28672):
            for tokens in (1, 16, 64, 256, 2048):
                tile, split_k = choose_tile(library, dtype, out_features, in_features, tokens, num_sms)
                sizes = (out_features, in_features)
                assert 0 < library.workspace_bytes(tile, dtype, sizes, tokens, split_k, num_sms) <= WORKSPACE_BYTES


def test_a_library_of_other_sources_is_refused(monkeypatch):
    path = compiled("80").path
    monkeypatch.setattr(bindings, "_ABI_VERSION", 999)
    with pytest.raises(RiaError, match="_cuda_sm80.so does not load: .*run `ria-vllm build-kernels` again"):
        bindings.load.__wrapped__(path)

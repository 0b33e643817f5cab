"""The CUDA build: what it picks, what it says when it cannot, and the libraries it makes."""

import shutil
import subprocess

import pytest
import torch
from click.testing import CliRunner
from compiled_cuda import chosen_tiles, compiled

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import bindings as cuda_library
from ria_vllm.serve.kernels.cuda import build as cuda_compile
from ria_vllm.serve.kernels.cuda.command import build_kernels
from ria_vllm.serve.kernels.cuda.tiles import SPLIT_FORCED, SPLIT_HEURISTIC, SPLIT_NONE, WORKSPACE_BYTES, choose_tile


@pytest.mark.parametrize(
    "written, name", [("90a", "90a"), ("sm_90a", "90a"), ("9.0", "90a"), ("8.6", "80"), ("89", "80"), ("120a", "120")]
)
def test_architectures_by_any_name(written, name):
    assert cuda_compile.architecture(written).name == name


def test_an_unknown_architecture_is_named():
    with pytest.raises(cuda_compile.CudaBuildError, match="'70'"):
        cuda_compile.architecture("70")


@pytest.mark.parametrize(
    "capability, name",
    [((8, 0), "80"), ((8, 9), "80"), ((9, 0), "90a"), ((10, 0), "100a"), ((12, 0), "120"), ((7, 5), None), ((10, 3), None)],
)
def test_each_gpu_finds_its_library(capability, name):
    found = cuda_compile.for_capability(*capability)
    assert (found and found.name) == name


def test_tile_names_are_unique():
    for target in cuda_compile.ARCHITECTURES.values():
        assert len({tile.name for tile in target.tiles}) == len(target.tiles)


@pytest.fixture
def no_gpu(monkeypatch):
    for name in ("RIA_VLLM_CUDA", "RIA_VLLM_CUDA_ARCHS", "RIA_VLLM_CUTLASS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_compile, "visible_architectures", lambda: [])
    return monkeypatch


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"RIA_VLLM_CUDA": "0"}, "RIA_VLLM_CUDA=0"),
        ({}, "no GPU visible"),
        ({"RIA_VLLM_CUDA_ARCHS": "75"}, "no kernels for CUDA architecture '75'"),
        ({"RIA_VLLM_CUDA_ARCHS": "90a", "RIA_VLLM_CUTLASS": "/nowhere"}, "/nowhere holds no CUTLASS headers"),
    ],
)
def test_an_install_that_builds_nothing_says_why_in_one_line(no_gpu, tmp_path, variables, reason):
    no_gpu.setattr(cuda_compile, "find_nvcc", lambda: "nvcc")
    for name, value in variables.items():
        no_gpu.setenv(name, value)
    said = []
    assert cuda_compile.at_install(tmp_path, said.append) == []
    assert len(said) == 1 and reason in said[0] and "\n" not in said[0]
    assert not list(tmp_path.iterdir())


def test_build_without_gpu_or_architecture_asks_for_one(no_gpu):
    result = CliRunner().invoke(build_kernels, [])
    assert isinstance(result.exception, RiaError) and "--arch" in str(result.exception)


def test_a_failing_compiler_is_quoted_and_leaves_nothing(no_gpu, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'metadata.h: unlucky' >&2\nexit 1\n")
    compiler.chmod(0o755)
    no_gpu.setattr(cuda_compile, "find_nvcc", lambda: str(compiler))
    no_gpu.setattr(cuda_compile, "find_headers", lambda: tmp_path)
    with pytest.raises(cuda_compile.CudaBuildError, match="unlucky"):
        cuda_compile.compile_library(cuda_compile.architecture("80"), tmp_path / "out")
    no_gpu.setenv("RIA_VLLM_CUDA_ARCHS", "80")
    said = []
    assert cuda_compile.at_install(tmp_path / "out", said.append) == []
    assert len(said) == 1 and "unlucky" in said[0] and "\n" not in said[0]
    assert not list(tmp_path.glob("out/*"))


HOPPER = ["128x16_streamk", "128x64_streamk", "128x128_cluster_streamk", "128x256_cluster"]
HOPPER_FP8 = ["fp8_128x16_streamk", "fp8_128x128_cluster_streamk"]
HOPPER_CANDIDATES = ["64x16_pingpong", "128x128_cluster_pingpong", "256x128_cluster"]


@pytest.mark.parametrize(
    "tiles, names",
    [
        ("small", [HOPPER[0], HOPPER_FP8[0]]),
        ("default", HOPPER + HOPPER_FP8),
        ("all", HOPPER + HOPPER_CANDIDATES + HOPPER_FP8),
    ],
)
def test_the_command_line_compiles_what_it_is_asked_to(monkeypatch, tmp_path, tiles, names):
    asked = []

    def compile_library(target, folder, chosen, say, jobs):
        asked.append((target.name, folder, sorted(tile.name for tile in chosen), jobs))
        path = tmp_path / target.library
        path.touch()
        return path

    monkeypatch.setattr(cuda_compile, "compile_library", compile_library)
    arguments = ["--arch", "9.0", "--tiles", tiles, "--jobs", "3", "--output", str(tmp_path)]
    result = CliRunner().invoke(build_kernels, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "_cuda_sm90a.so" in result.output
    assert asked == [("90a", tmp_path, sorted(names), 3)]


def test_tiles_that_were_not_compiled_are_named():
    assert sorted(cuda_compile.absent_tiles("_cuda_sm90a.so", HOPPER + HOPPER_FP8)) == sorted(HOPPER_CANDIDATES)
    assert cuda_compile.absent_tiles("_cuda_sm80.so", ["128x32", "128x64", "128x128"]) == []
    assert cuda_compile.absent_tiles("someone_elses.so", []) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_a_library_exports_its_interface_alone_and_needs_no_torch(arch):
    library = compiled(arch)
    assert sorted(library.tile_names) == sorted(tile.name for tile in chosen_tiles(arch))
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("no binutils")
    symbols = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-2] == "T"}
    ours = {name for name in exported if name.startswith("ria_")}
    assert {"ria_linear", "ria_pack_metadata", "ria_accepts", "ria_tiles"} <= ours
    needed = subprocess.run(["readelf", "-d", library.path], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed and "libcudart" not in needed and "libcuda.so" not in needed


PRODUCTS = [
    ("80", 108, torch.bfloat16),
    ("80", 108, torch.float16),
    ("90a", 132, torch.bfloat16),
    ("90a", 132, torch.float16),
    ("90a", 132, torch.float8_e4m3fn),
]


@pytest.mark.slow
@pytest.mark.parametrize("arch, sms, dtype", PRODUCTS)
def test_the_kernels_accept_every_size_the_backend_promises(arch, sms, dtype):
    """CUTLASS's own host-side checks: alignment, strides, layouts of all four operands."""
    library = compiled(arch)
    tile = tile_for(library, dtype)
    for sizes in [(8, 64), (24, 192), (4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (1000, 576)]:
        for tokens in (1, 7, 16, 64, 333, 2048, 8191):
            for split in (SPLIT_FORCED, SPLIT_HEURISTIC, SPLIT_NONE, 3):
                assert library.accepts(tile, dtype, sizes, tokens, split, sms), (sizes, tokens, split)
    for sizes, tokens in [((12, 64), 1), ((8, 96), 1), ((8, 64), 0)]:
        assert not library.accepts(tile, dtype, sizes, tokens, SPLIT_NONE, sms), (sizes, tokens)


def tile_for(library, dtype):
    tile, _ = choose_tile(library, dtype, 4096, 4096, 1, 100)
    assert library.tile_names[tile].startswith("fp8_") == (dtype == torch.float8_e4m3fn)
    return tile


@pytest.mark.slow
@pytest.mark.parametrize("arch, sms, dtype", PRODUCTS)
def test_the_workspace_holds_whatever_is_chosen(arch, sms, dtype):
    library = compiled(arch)
    for out_features in (64, 576, 4096, 11008, 28672, 128256):
        for in_features in (64, 576, 4096, 8192, 28672):
            for tokens in (1, 16, 64, 256, 2048):
                tile, split = choose_tile(library, dtype, out_features, in_features, tokens, sms)
                sizes = (out_features, in_features)
                assert 0 < library.workspace_bytes(tile, dtype, sizes, tokens, split, sms) <= WORKSPACE_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100a"])
def test_only_hopper_takes_fp8(arch):
    library = compiled(arch)
    assert library.metadata_bytes(64, 64, value_bits=8) == -1
    with pytest.raises(RiaError, match="cannot lay out the metadata of a 64 x 64 matrix of 8-bit values"):
        library.pack_metadata(torch.full((64, 8), 0x33, dtype=torch.uint8), value_bits=8)
    with pytest.raises(RiaError, match="no tile for a 64 x 64 layer of torch.float8_e4m3fn"):
        choose_tile(library, torch.float8_e4m3fn, 64, 64, 1, 100)


@pytest.mark.slow
def test_a_library_of_other_sources_is_refused(monkeypatch):
    path = compiled("80").path
    monkeypatch.setattr(cuda_library, "_INTERFACE", 999)
    with pytest.raises(RiaError, match="_cuda_sm80.so does not load: .*run `ria-vllm build-kernels` again"):
        cuda_library.load.__wrapped__(path)


@pytest.mark.slow
def test_a_product_without_its_scales_is_refused_before_any_launch():
    """Null pointers and the scales of other dtypes never reach a device."""
    library = compiled("90a")
    aligned = 1 << 20
    both, first, second, neither = (aligned, aligned), (aligned, None), (None, aligned), (None, None)
    for data_type, scales in [(2, neither), (2, first), (3, second), (0, both), (1, first)]:
        arguments = [0, data_type, 64, 64, 1, SPLIT_NONE, 132, 0, aligned, aligned, aligned, *scales, None, aligned]
        assert library._c.ria_linear(*arguments, aligned, WORKSPACE_BYTES, None) == 1  # a bad argument

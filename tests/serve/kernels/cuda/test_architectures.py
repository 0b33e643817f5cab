"""Which architecture serves a GPU, and which tiles each has."""

import pytest

from ria_vllm.serve.kernels.cuda.architectures import (
    CudaBuildError,
    find_architecture,
    for_capability,
    missing_tiles,
)

HOPPER = ["128x16_streamk", "128x64_streamk", "128x128_cluster_streamk", "128x256_cluster"]
HOPPER_FP8 = ["fp8_128x16_streamk", "fp8_128x128_cluster_streamk"]
HOPPER_CANDIDATES = ["64x16_pingpong", "128x128_cluster_pingpong", "256x128_cluster"]


@pytest.mark.parametrize("written, name", [("sm_90a", "90a"), ("9.0", "90a"), ("120a", "120")])
def test_architectures_by_any_name(written, name):
    assert find_architecture(written).name == name


def test_an_unknown_architecture_is_named():
    with pytest.raises(CudaBuildError, match="'70'"):
        find_architecture("70")


@pytest.mark.parametrize(
    "capability, name",
    [((8, 9), "80"), ((9, 0), "90a"), ((7, 5), None), ((10, 3), None)],
)
def test_each_gpu_finds_its_library(capability, name):
    found = for_capability(*capability)
    assert (found and found.name) == name


def test_tiles_that_were_not_compiled_are_named():
    assert sorted(missing_tiles("_cuda_sm90a.so", HOPPER + HOPPER_FP8)) == sorted(HOPPER_CANDIDATES)
    assert missing_tiles("_cuda_sm80.so", ["128x32", "128x64", "128x128"]) == ["int8_128x32", "int8_128x128"]
    assert missing_tiles("someone_elses.so", []) == []

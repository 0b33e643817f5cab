"""Which architecture serves a GPU, and which tiles each has."""

import pytest

from ria_vllm.serve.kernels.cuda.architectures import (
    find_architecture,
    for_capability,
)


@pytest.mark.parametrize("written, name", [("sm_90a", "90a"), ("9.0", "90a"), ("120a", "120")])
def test_architectures_by_any_name(written, name):
    assert find_architecture(written).name == name


@pytest.mark.parametrize(
    "capability, name",
    [((8, 9), "80"), ((9, 0), "90a"), ((7, 5), None), ((10, 3), None)],
)
def test_each_gpu_finds_its_library(capability, name):
    found = for_capability(*capability)
    assert (found and found.name) == name

"""Experts that compressed-tensors 0.12 stored, in one of vLLM's mixture layers, against a float64 product of the
weights that it dequantizes itself."""

import foreign_mixtures
import pytest
import torch
from compressed_tensors_writer import needs_writer
from foreign_mixtures import BITMASK, SPARSE
from mixture_layers import play_rank, route, run, served
from packed_checkpoints import Packed
from vllm.config import VllmConfig, set_current_vllm_config

from ria_vllm.errors import RiaError

pytestmark = [pytest.mark.usefixtures("ranks"), needs_writer]


def arguments(bits, size=None, kind="int", strategy="channel"):
    how = {"strategy": strategy} if size is None else {"strategy": "group", "group_size": size}
    return {"num_bits": bits, "type": kind, "symmetric": True} | how


FLOATS = {"dtype": torch.float32}
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CASES = {
    "bitmask": Packed("dense", None, sparsity=BITMASK, **FLOATS),
    "plain": Packed("dense", None, sparsity=SPARSE, **FLOATS),
    "bitmask, int8": Packed("int-quantized", arguments(8), sparsity=BITMASK),
    "bitmask, int8 by tensor": Packed("int-quantized", arguments(8, strategy="tensor"), sparsity=BITMASK),
    "bitmask, fp8": Packed("float-quantized", arguments(8, kind="float"), sparsity=BITMASK),
    "int8": Packed("int-quantized", arguments(8), sparsity=SPARSE),
    "int8 by tensor": Packed("int-quantized", arguments(8, strategy="tensor"), sparsity=SPARSE, **FLOATS),
    "int8 in groups of 64": Packed("int-quantized", arguments(8, 64), sparsity=SPARSE),
    "int4 in groups of 32": Packed("int-quantized", arguments(4, 32), sparsity=SPARSE),
    "naive int8": Packed("naive-quantized", arguments(8), sparsity=SPARSE),
    "fp8 by tensor": Packed("float-quantized", arguments(8, kind="float", strategy="tensor"), sparsity=SPARSE),
    "pack, int4": Packed("pack-quantized", arguments(4), sparsity=SPARSE),
    "pack, int4 in groups of 64": Packed("pack-quantized", arguments(4, 64), sparsity=SPARSE, **FLOATS),
    "pack, int8": Packed("pack-quantized", arguments(8), sparsity=SPARSE),
    "marlin, int4": Packed("marlin-24", arguments(4)),
    "marlin, int4 in groups": Packed("marlin-24", arguments(4, 128)),
    "marlin, int8": Packed("marlin-24", arguments(8)),
    "marlin, int8 in groups": Packed("marlin-24", arguments(8, 128)),
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return foreign_mixtures.layers(tmp_path_factory.mktemp("experts"), CASES)


def close(got, want):
    assert want.std() > 0.05
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_form(stored, experts_path, name):
    model = served(stored[name])
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored[name].expected(x, weights, ids))
    assert (model.experts.ria_experts is not None) == (experts_path != "vllm")

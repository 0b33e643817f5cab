"""What the linear method refuses: damaged tensors, and layers that it cannot serve."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from compressed_tensors_layers import INT, Checkpoint
from stored import Stored
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FORMATS

HIDDEN, INNER = 128, 256

pytestmark = pytest.mark.usefixtures("ranks")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("float", lambda t: t["bitmask"].__setitem__((3, 1), 0b01110011), r"fc: row 3, columns 8 to 15: .*damaged"),
        ("float", lambda t: t.pop("compressed"), r"fc\.compressed is in none"),
        ("float", lambda t: t.update(compressed=t["compressed"].int()), r"fc\.compressed is torch.int32"),
        ("float", lambda t: t.update(bitmask=t["bitmask"][:, :-1]), r"fc\.bitmask is torch.uint8 \(64, 15\)"),
        ("float", lambda t: t.update(compressed=torch.cat([t["compressed"]] * 2)), r"fc\.compressed is .*\(128, 64\)"),
        ("int8", lambda t: t.update(weight_scale=t["weight_scale"][0, 0]), r"fc\.weight_scale is torch.float32 \(\)"),
        ("int4-g64", lambda t: t.pop("weight_scale"), r"fc\.weight_scale is in none"),
        ("int4-g64", lambda t: t.update(weight_scale=t["weight_scale"][:, ::2]), r"fc\.weight_scale is .* \(64, 1\)"),
        ("int4-g64", lambda t: t.update(weight_scale=t["weight_scale"].double()), r"is torch.float64"),
        ("int4-g64", lambda t: t["weight_scale"].__setitem__((3, 1), float("nan")), "fc: a weight_scale is not"),
        ("int4-g64", lambda t: t.update(compressed=t["compressed"].view(torch.int8)), r"fc\.compressed is torch.int8"),
    ],
)  # fmt: skip
def test_damage_names_the_tensor(name, change, message):
    stored = Stored(weight_format=FORMATS[name])
    stored.add("fc", 64, HIDDEN)
    change(stored.tensors["fc"])
    with pytest.raises(RiaError, match=message):
        stored.load(ReplicatedLinear(HIDDEN, 64, quant_config=stored.config(), prefix="fc"), {"fc": None})


def test_one_number_where_each_row_has_a_scale_in_other_peoples_folders():
    """config.json says `channel`, and the file has the scale of a whole tensor."""
    layer = ReplicatedLinear(HIDDEN, 64, quant_config=Checkpoint(INT).config(), prefix="fc")
    with pytest.raises(RiaError, match=r"fc\.weight_scale"):
        layer.weight_scale.weight_loader(layer.weight_scale, torch.tensor(0.5))


def test_fused_layer_that_is_partly_dense():
    stored = Stored()
    stored.add("gate", INNER, HIDDEN)
    with pytest.raises(RiaError, match="gate_up: .* up is not stored like the others"):
        MergedColumnParallelLinear(HIDDEN, [INNER, INNER], quant_config=stored.config(), prefix="gate_up")


def test_fused_linears_under_different_permutations():
    stored = Stored()
    for name in ("gate", "up"):
        stored.add(name, INNER, HIDDEN, stored.permutation(HIDDEN))
    with pytest.raises(RiaError, match="gate_up: vLLM fuses gate, up, .*ria-vllm export"):
        MergedColumnParallelLinear(HIDDEN, [INNER, INNER], quant_config=stored.config(), prefix="gate_up")


def test_permutation_of_another_size():
    stored = Stored()
    stored.add("fc", 64, HIDDEN)
    stored.permutations["fc"] = np.arange(64, dtype=np.int32)
    layer = ReplicatedLinear(HIDDEN, 64, quant_config=stored.config(), prefix="fc")
    with pytest.raises(RiaError, match="fc: its permutation has 64 channels"):
        stored.load(layer, {"fc": None})


@pytest.mark.parametrize(
    ("name", "columns", "size", "message"),
    [("float", 192, 48, "leave 4 each"), ("int4-g64", 192, 2, "leave 96 each.*a group of 64")],
)
def test_too_many_ranks(ranks, name, columns, size, message):
    stored = Stored(weight_format=FORMATS[name])
    stored.add("down", HIDDEN, columns)
    ranks(0, size)
    with pytest.raises(RiaError, match=f"down: {columns} input channels over {size} ranks {message}"):
        RowParallelLinear(columns, HIDDEN, quant_config=stored.config(), prefix="down")


@pytest.mark.parametrize(
    ("options", "lora", "variable", "refused"),
    [
        ({"smooth": 0.5}, True, None, True),
        ({"smooth": 0.5}, True, "1", False),
        ({"smooth": 0.5}, False, None, False),
        ({"smooth": 0.0}, True, None, False),
        ({"rotate": "heads"}, True, None, True),
        ({"rotate": "none"}, True, None, False),
        ({"rotate": "heads"}, True, "1", False),
    ],
)
def test_adapters_for_a_folder_with_other_channels(monkeypatch, options, lora, variable, refused):
    """Those of the dense model would give wrong answers; those of the folder itself are right."""
    if variable is not None:
        monkeypatch.setenv("RIA_VLLM_OWN_ADAPTERS", variable)
    current = VllmConfig()
    current.lora_config = LoRAConfig(max_lora_rank=8) if lora else None
    stored = Stored()
    stored.add("proj", 8, 16)
    config = stored.config()
    config.schema.recipe |= options
    with set_current_vllm_config(current):
        with (
            pytest.raises(RiaError, match="scaled or rotated.* (--smooth 0|--rotate none). If")
            if refused
            else nullcontext()
        ):
            assert config.get_quant_method(ReplicatedLinear(16, 8, bias=False), "proj") is not None

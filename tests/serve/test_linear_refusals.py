"""What the linear method refuses: damaged tensors, and layers that it cannot serve."""

import numpy as np
import pytest
import torch
from compressed_tensors_layers import INT, Checkpoint
from stored import Stored
from vllm.config import LoadConfig, LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FORMATS

HIDDEN, INNER = 128, 256

pytestmark = pytest.mark.usefixtures("engine")


def damaged(change, weight_format=FLOAT):
    stored = Stored(weight_format=weight_format)
    stored.add("fc", 64, HIDDEN)
    change(stored.tensors["fc"])
    stored.load(ReplicatedLinear(HIDDEN, 64, quant_config=stored.config(), prefix="fc"), {"fc": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["bitmask"].__setitem__((3, 1), 0b01110011), r"fc: row 3, columns 8 to 15: .*damaged"),
        (lambda t: t.pop("bitmask"), r"fc\.bitmask is in none of the weight files"),
        (lambda t: t.pop("compressed"), r"fc\.compressed is in none of the weight files"),
        (lambda t: t.update(compressed=t["compressed"].int()), r"fc\.compressed is torch.int32"),
        (
            lambda t: t.update(bitmask=t["bitmask"][:, :-1]),
            r"fc\.bitmask is torch.uint8 \(64, 15\), .*needs torch.uint8 \(64, 16\)",
        ),
        (lambda t: t.update(compressed=torch.cat([t["compressed"]] * 2)), r"fc\.compressed is .*\(128, 64\)"),
    ],
)
def test_damage_names_the_layer(ranks, change, message):
    with pytest.raises(RiaError, match=message):
        damaged(change)


ONE_SCALE = r"fc\.weight_scale is torch.float32 \(\), but the model needs .*torch.float32 \(64, 1\)\. The file"


def test_one_number_where_each_row_has_a_scale(ranks):
    with pytest.raises(RiaError, match=ONE_SCALE):
        damaged(lambda t: t.update(weight_scale=t["weight_scale"][0, 0]), FORMATS["int8"])


def test_one_number_where_each_row_has_a_scale_in_other_peoples_folders(ranks):
    """config.json says `channel`, and the file has the scale of a whole tensor."""
    layer = ReplicatedLinear(HIDDEN, 64, quant_config=Checkpoint(INT).config(), prefix="fc")
    with pytest.raises(RiaError, match=ONE_SCALE):
        layer.weight_scale.weight_loader(layer.weight_scale, torch.tensor(0.5))


def test_fused_layer_that_is_partly_dense(ranks):
    stored = Stored()
    stored.add("gate", INNER, HIDDEN)
    with pytest.raises(RiaError, match=r"gate_up: vLLM fuses gate, up, but up is dense"):
        MergedColumnParallelLinear(HIDDEN, [INNER, INNER], quant_config=stored.config(), prefix="gate_up")


def test_permutation_of_another_size(ranks):
    stored = Stored()
    stored.add("fc", 64, HIDDEN)
    stored.orders["fc"] = np.arange(64, dtype=np.int32)
    layer = ReplicatedLinear(HIDDEN, 64, quant_config=stored.config(), prefix="fc")
    with pytest.raises(RiaError, match="fc: its permutation has 64 channels, its input 128"):
        stored.load(layer, {"fc": None})


def test_too_many_ranks(ranks):
    stored = Stored()
    stored.add("down", HIDDEN, 64 * 3)
    ranks(0, 48)
    with pytest.raises(RiaError, match="leave 4 each"):
        RowParallelLinear(64 * 3, HIDDEN, quant_config=stored.config(), prefix="down")


@pytest.mark.parametrize("load_format", ["sharded_state", "runai_streamer_sharded"])
def test_weights_that_another_kernel_packed_are_refused(ranks, load_format):
    stored = Stored()
    stored.add("down", HIDDEN, INNER)
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format))):
        with pytest.raises(RiaError, match=f"--load-format {load_format} .*without this option"):
            RowParallelLinear(INNER, HIDDEN, quant_config=stored.config(), prefix="down")


@pytest.mark.parametrize(
    ("options", "lora", "variable", "instead"),
    [
        ({"smooth": 0.5}, True, None, "with --smooth 0"),
        ({"smooth": 0.5}, True, "0", "with --smooth 0"),
        ({"smooth": 0.5}, True, "1", None),
        ({"smooth": 0.5}, False, None, None),
        ({"smooth": 0.0}, True, None, None),
        ({"rotate": "heads"}, True, None, "again"),
        ({"rotate": "heads"}, True, "1", None),
        ({"rotate": "none"}, True, None, None),
        ({"smooth": 0.5, "rotate": "heads"}, True, None, "with --smooth 0"),
        ({"rotate": "heads", "stored": True}, True, None, None),
        ({"rotate": "in another way", "stored": True}, True, None, "again"),
        ({"smooth": 0.5, "rotate": "heads", "stored": True}, True, None, "with --smooth 0"),
        ({}, True, None, None),
    ],
)
def test_adapters_for_a_folder_with_other_channels(ranks, monkeypatch, options, lora, variable, instead):
    """Those of the dense model would give wrong answers, unless it is stored how heads were turned; those of the folder
    itself are right."""
    if variable is not None:
        monkeypatch.setenv("RIA_VLLM_OWN_ADAPTERS", variable)
    current = VllmConfig()
    current.lora_config = LoRAConfig(max_lora_rank=8) if lora else None
    stored = Stored()
    stored.add("proj", 8, 16)
    config = stored.config()
    config.schema.rotations_digest = "0" * 64 if options.get("stored") else None
    config.schema.recipe |= options
    with set_current_vllm_config(current):
        if instead:
            with pytest.raises(
                RiaError, match=rf"scaled or rotated .*compress the model {instead}\. .*RIA_VLLM_OWN_ADAPTERS=1"
            ):
                config.get_quant_method(ReplicatedLinear(16, 8, bias=False), "proj")
        else:
            assert config.get_quant_method(ReplicatedLinear(16, 8, bias=False), "proj") is not None

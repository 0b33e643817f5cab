"""2:4 checkpoints of compressed-tensors, which vLLM itself refuses."""

from pathlib import Path

import compressed_tensors_checkpoints
import pytest
import torch
from compare import check, generate, prompts
from safetensors.torch import load_file

from ria_vllm import formats, sparse24
from ria_vllm.errors import RiaError
from ria_vllm.serve.compressed_tensors import is_24_checkpoint
from ria_vllm.serve.config import RiaConfig

# Name of the run: how the checkpoint is written
RUNS = {
    "packed": {"sparse_format": "sparse-24-bitmask"},
    "plain": {"sparse_format": "dense"},
    "plain, one linear not 2:4": {"sparse_format": "dense", "spoiled": "1.mlp.down_proj"},
    "packed, int8 by channel": {"sparse_format": "sparse-24-bitmask", "kind": "int"},
    "packed, fp8 by tensor, static": {
        "sparse_format": "sparse-24-bitmask", "kind": "float", "strategy": "tensor", "static": True,
    },
    "plain, int8 by tensor, static": {"sparse_format": "dense", "kind": "int", "strategy": "tensor", "static": True},
    "packed, int8 by channel, one linear not 2:4": {
        "sparse_format": "sparse-24-bitmask", "kind": "int", "spoiled": "1.mlp.down_proj",
    },
    "plain, fp8 by channel": {"sparse_format": "dense", "kind": "float"},
    "plain, int8 by channel, one linear not 2:4, reloaded": {
        "sparse_format": "dense", "kind": "int", "spoiled": "1.mlp.down_proj",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed-tensors")
    models = [
        compressed_tensors_checkpoints.write(folder / str(i), **written) for i, written in enumerate(RUNS.values())
    ]
    jobs = [
        {
            "model": str(folder / str(i)), "prompts": prompts(), "tokens": 6, "engine": {"dtype": "float32"},
            **({"first": "reload"} if name.endswith("reloaded") else {}),
        }
        for i, name in enumerate(RUNS)
    ]  # fmt: skip
    results = generate(folder / "run", jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return dict(zip(RUNS, zip(models, results, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_served_as_the_weights_say(runs, name):
    """Activations keep their precision, so the oracle has no activation quantization either."""
    check(*runs[name])


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "fp8"])
def test_reads_what_compressed_tensors_wrote(name):
    """The file was written, and decompressed, by compressed-tensors 0.12.2 itself."""
    stored = load_file(Path(__file__).parent / "data" / "compressed_tensors_0_12.safetensors")
    values = stored[f"{name}.compressed"]
    if values.dtype in (torch.int8, torch.float8_e4m3fn):
        values = values.float()
    assert sparse24.check_bitmask(stored[f"{name}.bitmask"]) is None
    assert torch.equal(
        sparse24.decompress(values, stored[f"{name}.bitmask"]).float(), stored[f"{name}.decompressed"].float()
    )


def config(**changes):
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "sparsity_config": sparsity | changes.pop("sparsity", {})} | changes


@pytest.mark.parametrize(
    ("given", "taken_over"),
    [
        (config(), True),
        (config(sparsity={"format": "dense"}), True),
        (config(format="int-quantized"), True),
        (config(sparsity={"sparsity_structure": "unstructured"}), False),
        (config(sparsity={"format": "sparse-bitmask"}), False),
        (config(sparsity={"targets": []}), False),  # vLLM serves these
        (config(format="pack-quantized"), True),
        (config(format="pack-quantized", sparsity={"sparsity_structure": "unstructured"}), False),
        (config(format="marlin-24"), True),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "sparsity_config": {}}, True),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"group_0": {"format": "int-quantized"}, "group_1": {"format": "marlin-24"}},
            },
            True,
        ),
        (config(quant_method="ria"), False),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, False),
    ],
)
def test_which_checkpoints_are_taken_over(given, taken_over):
    assert is_24_checkpoint(given) is taken_over
    assert RiaConfig.override_quantization_method(given, None) == ("ria" if taken_over else None)


def test_explicit_choice_of_another_method_stands():
    assert RiaConfig.override_quantization_method(config(), "compressed-tensors") is None


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 3, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "group"},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
        {"num_bits": 4, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ],
)
def test_unknown_quantization_is_named(weights):
    with pytest.raises(RiaError, match=r"config_groups\.group_0: .*are not served"):
        RiaConfig.from_config(config(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}))


def test_a_group_without_weights_is_passed_over():
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
        "group_1": {
            "targets": ["LlamaAttention"],
            "weights": None,
            "input_activations": {"num_bits": 8, "type": "float"},
        },
    }
    chosen = RiaConfig.from_config(config(config_groups=groups))
    assert chosen.scheme("model.layers.0.mlp.up_proj").format == formats.INT8


def test_a_group_that_names_a_linear_goes_first():
    int8 = {"num_bits": 8, "type": "int"}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": int8 | {"strategy": "channel"}},
        "group_1": {"targets": ["re:.*down_proj"], "weights": int8 | {"strategy": "tensor"}},
    }
    chosen = RiaConfig.from_config(config(config_groups=groups))
    assert chosen.scheme("model.layers.0.mlp.down_proj").strategy == "tensor"
    assert chosen.scheme("model.layers.0.mlp.up_proj").strategy == "channel"


def test_targets_and_ignore():
    chosen = RiaConfig.from_config(
        config(sparsity={"targets": ["re:model.layers.*proj"], "ignore": ["model.layers.0.o_proj"]})
    )
    assert chosen._is_pruned("model.layers.0.q_proj")
    assert not chosen._is_pruned("model.layers.0.o_proj")
    assert not chosen._is_pruned("lm_head")

"""2:4 checkpoints of compressed-tensors, which vLLM itself refuses."""

from pathlib import Path

import compressed_tensors_checkpoints
import pytest
import tiny
import torch
from compare import check, generate, prompts
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file

from ria_vllm.compressed_tensors.config import is_24_checkpoint
from ria_vllm.errors import RiaError
from ria_vllm.format import sparse24
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.layer_matching import match_layers

# Name of the run: how the checkpoint is written
RUNS = {
    "plain, one linear not 2:4": {"sparse_format": "dense", "spoiled": "1.mlp.down_proj"},
    "packed, fp8 by tensor, static": {
        "sparse_format": "sparse-24-bitmask", "kind": "float", "strategy": "tensor", "static": True,
    },
    "packed, int8 by channel, one linear not 2:4": {
        "sparse_format": "sparse-24-bitmask", "kind": "int", "spoiled": "1.mlp.down_proj",
    },
    "plain, int8 by channel, one linear not 2:4": {
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
        }
        for i in range(len(RUNS))
    ]  # fmt: skip
    results = generate(folder / "run", jobs)
    return dict(zip(RUNS, zip(models, results, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_served_as_the_weights_say(runs, name):
    """Activations keep their precision, so the oracle has no activation quantization either."""
    check(*runs[name])


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "fp8"])
def test_reads_what_compressed_tensors_wrote(name):
    """The file was written, and decompressed, by compressed-tensors 0.12.2 itself."""
    stored = load_file(Path(__file__).parents[1] / "data" / "compressed_tensors_0_12.safetensors")
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
        (config(sparsity={"sparsity_structure": "unstructured"}), False),
        (config(sparsity={"targets": []}), False),
        (config(format="pack-quantized", sparsity={"sparsity_structure": "unstructured"}), False),
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
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ],
)
def test_unknown_quantization_is_named(weights):
    with pytest.raises(RiaError, match=r"config_groups\.group_0: .*are not served"):
        RiaConfig.from_config(config(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}))


def groups(weights, inputs=None, **others):
    weights = {"type": "int", "symmetric": True} | weights
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs} | others}
    }


BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GROUPS_OF_128 = {"num_bits": 4, "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (groups({"num_bits": 4, "strategy": "group", "group_size": 64}), "in marlin-24, .*'group_size': 64.* served"),
        (groups({"num_bits": 4, "strategy": "group", "group_size": 96}), "'group_size': 96.* are not served"),
        (groups(GROUPS_OF_128, format="pack-quantized") | {
            "sparsity_config": {"format": "sparse-24-bitmask"}}, "pack-quantized' is not served with"),
        (groups(GROUPS_OF_128, format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized' is not served")
    ],
)  # fmt: skip
def test_what_packed_forms_lack_is_named(changes, message):
    given = {"quant_method": "compressed-tensors", "format": "marlin-24"} | changes
    with pytest.raises(RiaError, match=message):
        RiaConfig.from_config(given)


@pytest.mark.parametrize(
    ("inputs", "rounded"),
    [
        (BY_TOKEN, torch.int8),
        (BY_TOKEN | {"strategy": "tensor", "dynamic": False}, torch.int8),
        (BY_TOKEN | {"symmetric": False}, None),
    ],
)
def test_inputs_that_are_rounded(inputs, rounded):
    chosen = RiaConfig.from_config(
        config(format="pack-quantized", sparsity={"format": "dense"}, **groups(GROUPS_OF_128, inputs))
    )
    scheme = chosen.scheme("model.layers.0.mlp.up_proj")
    assert (scheme.format.name, scheme.activations, scheme.dense) == ("int4-g128", rounded, True)


def test_marlin_in_mixed_precision():
    given = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "format": "int-quantized", "input_activations": BY_TOKEN,
                        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
            "group_1": {"targets": ["re:.*down_proj"], "format": "marlin-24",
                        "weights": {"type": "int"} | GROUPS_OF_128},
        },
    }  # fmt: skip
    chosen = RiaConfig.from_config(given)
    chosen._read_names([
        *(f"0.down_proj.{part}" for part in ("weight_packed", "scale_packed", "meta")),
        *(f"0.up_proj.{part}" for part in ("weight", "weight_scale")), "lm_head.weight",
    ])  # fmt: skip
    assert chosen.pruned == {"0.down_proj"} and chosen.required == {"0.down_proj", "0.up_proj"}
    down, up = chosen.scheme("0.down_proj"), chosen.scheme("0.up_proj")
    assert (down.format.name, down.dense, down.activations) == ("int4-g128", False, None)
    assert (up.format.name, up.dense, up.activations) == ("int8", True, torch.int8)
    assert not chosen.is_quantized("lm_head")


def test_overlapping_groups_go_to_the_most_specific_target():
    """As compressed-tensors itself decides when it applies the config to a model."""
    down = "re:model.*down_proj", "re:.*[13].mlp.down_proj", "model.layers.0.mlp.down_proj"
    targets = ["Linear", *down, "re:.*o_proj", "re:.*o_proj"]
    sizes = [32, 64, 128]
    ways = [{"strategy": "tensor"}, {"strategy": "channel"}, *({"strategy": "group", "group_size": g} for g in sizes)]
    ways = [{"num_bits": bits, "type": "int"} | way for bits in (4, 8) for way in ways]
    of_groups = {str(i): {"targets": [one], "weights": way} for i, (one, way) in enumerate(zip(targets, ways))}
    chosen = RiaConfig.from_config(
        config(format="pack-quantized", sparsity={"format": "dense"}, config_groups=of_groups)
    )
    model = tiny.model_of(tiny.FAMILIES["llama-gqa"], num_hidden_layers=3)
    apply_quantization_config(model, QuantizationConfig(config_groups=of_groups, quantization_status="initialized"))
    taken = set()
    for name in tiny.linears(model):
        scheme, args = chosen.scheme(name), model.get_submodule(name).quantization_scheme.weights
        theirs = (args.num_bits, args.group_size, args.strategy == "tensor")
        assert (scheme.format.num_bits, scheme.format.group_size, scheme.strategy == "tensor") == theirs, name
        taken.add(theirs)
    assert len(taken) == len(targets) - 1  # of two groups with one target, the last is taken


def test_quantized_linears_without_a_layer_are_refused_by_name(ranks):
    """No layer of ours serves them, and vLLM's would take their integers for weights. Ignored ones stay vLLM's."""
    linears = [f"model.layers.0.mlp.blocks.{e}.up_proj" for e in (0, 1)]
    int8 = groups({"num_bits": 8, "strategy": "channel"})
    tensors = [f"{name}.{part}" for name in linears for part in ("weight", "weight_scale")]
    for ignore, refused in (([], True), (["re:.*blocks.*"], False)):
        chosen = RiaConfig.from_config(
            config(format="int-quantized", sparsity={"format": "dense"}, **int8, ignore=ignore)
        )
        chosen._read_names(tensors)
        assert (chosen.required == set(linears)) == refused
        if refused:
            with pytest.raises(RiaError, match=rf"not be served: {linears[0]}, {linears[1]}.*needs a layer"):
                match_layers(chosen, torch.nn.Module())
        else:
            match_layers(chosen, torch.nn.Module())

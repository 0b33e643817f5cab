"""quantization_config: what is read, what is refused, and which folds hold."""

import copy

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FP8
from ria_vllm.format.schema import INT8_TOKENS, RiaSchema

CONFIG = {
    "quant_method": "ria",
    "format": "sparse-24-bitmask",
    "format_version": 1,
    "sparsity_config": {"sparsity_structure": "2:4", "ignore": ["lm_head", "model.layers.0.mlp.up_proj"]},
    "folds": [
        {
            "consumer": "model.layers.{i}.mlp.down_proj",
            "producers": [{"name": "model.layers.{i}.mlp.gate_up_proj", "rows": [0, 64]}],
            "coupling": "elementwise",
        }
    ],
    "recipe": {"method": "ria"},
}


def test_written_and_read_again():
    schema = RiaSchema.parse(CONFIG, "config.json")
    assert RiaSchema.parse(schema.model_dump(), "config.json") == schema


def test_keys_of_a_newer_minor_version_are_kept():
    assert RiaSchema.parse(CONFIG | {"future": 1}, "config.json").model_dump()["future"] == 1


@pytest.mark.parametrize(
    "path, value, field",
    [
        (("format_version",), 2, "format_version"),
        (("format",), "dense", "format"),
        (("quant_method",), "awq", "quant_method"),
        (("sparsity_config", "sparsity_structure"), "1:4", "sparsity_config.sparsity_structure"),
        (("sparsity_config", "ignore"), ["lm_head", "re:.*"], "sparsity_config.ignore"),
        (("weights",), {"num_bits": 3}, "weights: .* no weight format with"),
        (("weights",), {"type": "x" * 5000}, "weights.type"),
        (("weights",), {"group_size": 32}, "weights: .* no weight format with"),
        (("weights",), {"strategy": "group"}, "weights: .* no weight format with"),
        (("weights",), {"num_bits": 4, "strategy": "group", "group_size": 16}, "weights: .* no weight format with"),
        (("weights",), {"dtype": "int8"}, "weights.dtype"),
        (("weights",), {"zero_point": True}, "weights.zero_point"),
        (("folds", 0, "coupling"), "magic", "folds.0.coupling"),
        (("folds", 0, "producers"), [], "folds.0.producers"),
        (("folds", 0, "producers", 0, "rows"), [0], "folds.0.producers.0.rows"),
        (("folds", 0, "producers", 0), {"name": "{i}.up_proj", "blocks": 2}, "folds.0.producers.0"),
        (("folds",), CONFIG["folds"] * 1001, "folds"),
        (("folds", 0, "consumer"), "{i}.{i}.mlp.down_proj", "folds.0"),
        (("folds", 0, "consumer"), "model.down_proj", "folds.0"),
        (("folds", 0, "producers", 0, "name"), "model.up_proj", "folds.0"),
        (("folds", 0, "producers", 0, "name"), "{i}.{i}", "folds.0"),
    ],
)
def test_a_wrong_field_is_refused_by_name(path, value, field):
    config = copy.deepcopy(CONFIG)
    target = config
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    with pytest.raises(RiaError, match=f"somewhere.json: quantization_config.{field}"):
        RiaSchema.parse(config, "somewhere.json")


INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def test_inputs_are_rounded_in_exactly_these_words():
    assert RiaSchema.parse(CONFIG, "config.json").input_dtype is None
    assert "input_activations" not in RiaSchema.parse(CONFIG, "config.json").model_dump(exclude_none=True)
    schema = RiaSchema.parse(CONFIG | {"weights": {}, "input_activations": INPUTS}, "config.json")
    assert schema.input_dtype == torch.int8 and schema.input_activations == INT8_TOKENS
    assert schema.model_dump(mode="json", exclude_none=True)["input_activations"] == INPUTS
    others = {"num_bits": 4, "type": "uint", "strategy": "tensor", "dynamic": False, "symmetric": False}
    for field, other in others.items():
        with pytest.raises(RiaError, match=f"quantization_config.input_activations.{field}"):
            RiaSchema.parse(CONFIG | {"weights": {}, "input_activations": INPUTS | {field: other}}, "config.json")
        without = {name: value for name, value in INPUTS.items() if name != field}
        with pytest.raises(RiaError, match=f"quantization_config.input_activations.{field}"):
            RiaSchema.parse(CONFIG | {"weights": {}, "input_activations": without}, "config.json")
    with pytest.raises(RiaError, match="input_activations.block_size"):
        RiaSchema.parse(CONFIG | {"weights": {}, "input_activations": INPUTS | {"block_size": 4}}, "config.json")
    fp8 = dict(FP8.quantization)
    for weights, kind in (({}, "float"), (fp8, "int")):
        with pytest.raises(RiaError, match="input_activations have another type than weights"):
            RiaSchema.parse(CONFIG | {"weights": weights, "input_activations": INPUTS | {"type": kind}}, "config.json")
    schema = RiaSchema.parse(CONFIG | {"weights": fp8, "input_activations": INPUTS | {"type": "float"}}, "config.json")
    assert schema.weight_format == FP8 and schema.input_dtype == torch.float8_e4m3fn
    with pytest.raises(RiaError, match="input_activations without weights"):
        RiaSchema.parse(CONFIG | {"input_activations": INPUTS}, "config.json")


def test_ignored_by_exact_name():
    schema = RiaSchema.parse(CONFIG, "config.json")
    assert schema.ignored("lm_head") and schema.ignored("model.layers.0.mlp.up_proj")
    assert not schema.ignored("model.layers.10.mlp.up_proj") and not schema.ignored("x.lm_head")


EXPERTS = {
    "module": "h.{i}.experts",
    "num_experts": 4,
    "gate": "h.{i}.experts.{e}.gate",
    "up": "h.{i}.experts.{e}.up",
    "down": "h.{i}.experts.{e}.down",
    "stacked": [
        {"tensor": "h.{i}.experts.gate_up", "linears": ["gate", "up"], "interleaved": True},
        {"tensor": "h.{i}.experts.down", "linears": ["down"]},
    ],
}
GATE_UP, DOWN = EXPERTS["stacked"]


def test_experts_are_parsed():
    names = {kind: f"g.{{i}}.experts.{{e}}.{kind}" for kind in ("up", "down")}
    ungated = EXPERTS | {"module": "g.{i}.experts", "gate": None, "stacked": []} | names
    schema = RiaSchema.parse(CONFIG | {"experts": [EXPERTS, ungated]}, "config.json")
    gated, plain = schema.experts
    assert gated.linears == {kind: EXPERTS[kind] for kind in ("gate", "up", "down")}
    assert gated.stacked[0].interleaved and not gated.stacked[0].transposed and gated.stacked[0].bias is None
    assert plain.linears == names


@pytest.mark.parametrize(
    "change",
    [
        {"up": "h.{i}.experts.up"},
        {"down": "h.3.experts.{e}.down"},
        {"down": "h.{i}.other.{e}.down"},
        {"module": "h.{i}.{e}"},
        {"stacked": [GATE_UP, DOWN | {"tensor": "h.3.down"}]},
        {"stacked": [GATE_UP, DOWN | {"linears": []}]},
        {"stacked": [GATE_UP]},
        {"stacked": [GATE_UP, DOWN | {"linears": ["down", "up"]}]},
        {"stacked": [GATE_UP, DOWN | {"tensor": GATE_UP["tensor"]}]},
        {"stacked": [GATE_UP, DOWN | {"bias": "h.3.bias"}]},
        {"gate": None},
        {"router": "h.{i}.gate"},
    ],
)
def test_wrong_experts_are_refused(change):
    with pytest.raises(RiaError, match="somewhere.json: quantization_config.experts.0"):
        RiaSchema.parse(CONFIG | {"experts": [EXPERTS | change]}, "somewhere.json")


def test_two_entries_for_the_same_experts_are_refused():
    with pytest.raises(RiaError, match="quantization_config.experts: .*two entries have one module"):
        RiaSchema.parse(CONFIG | {"experts": [EXPERTS, EXPERTS | {"num_experts": 8}]}, "config.json")


def test_a_fold_holds_only_where_its_producers_are_pruned():
    schema = RiaSchema.parse(CONFIG, "config.json")
    names = {f"model.layers.{i}.mlp.{part}" for i in (1, 2) for part in ("down_proj", "gate_up_proj")}
    sparse = names - {"model.layers.2.mlp.gate_up_proj"}
    permuted = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert [name for name, _, _ in schema.active_folds(permuted, sparse)] == ["model.layers.1.mlp.down_proj"]
    assert not list(schema.active_folds([], names))

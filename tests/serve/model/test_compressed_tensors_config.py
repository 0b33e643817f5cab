"""Odd and hostile configs of compressed-tensors are parsed, or refused with the key's name, in bounded time."""

import copy
import json
import time

import pytest
import torch
from compressed_tensors.utils import is_match, match_targets
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ria_vllm.compressed_tensors.config import CompressedTensorsConfig, is_24_checkpoint
from ria_vllm.errors import RiaError
from ria_vllm.serve.model.config import RiaConfig

VALID = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "kv_cache_scheme": None,
    "sparsity_config": {
        "format": "sparse-24-bitmask", "sparsity_structure": "2:4", "global_sparsity": 0.5,
        "targets": ["Linear", "re:model\\.layers\\.\\d+\\.mlp\\..*"], "ignore": ["lm_head", "re:.*lm_head"],
    },
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            "output_activations": None,
        },
        "group_1": {
            "targets": ["re:.*down_proj", "model.layers.0.mlp.up_proj"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "tensor"},
            "input_activations": None,
        },
    },
}  # fmt: skip
NAMES = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "a" * 300]


def changed(path, value):
    config = copy.deepcopy(VALID)
    *parents, last = path
    found = config
    for key in parents:
        found = found[key]
    found[last] = value
    return config


def test_a_valid_config():
    config = RiaConfig.from_config(VALID)
    assert config.scheme("model.layers.0.mlp.down_proj").strategy == "tensor"
    assert config.scheme("model.layers.0.mlp.gate_proj").strategy == "channel"
    with pytest.raises(RiaError, match="kv_cache_scheme: .*Remove this key"):
        RiaConfig.from_config(VALID | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})


GROUP = ("config_groups", "group_0")


ENTRIES = ["Linear", "Module", "Conv2d", "lm_head", "re:.*lm_head", "re:.*mlp.*", "re:model.layers.0", NAMES[1]]
SELECTED = st.lists(st.sampled_from(ENTRIES), max_size=3)


@settings(deadline=None)
@given(st.lists(SELECTED, min_size=1, max_size=3), SELECTED)
def test_linears_are_selected_as_by_compressed_tensors(targets, ignore):
    linear = torch.nn.Linear(1, 1, device="meta")
    groups = {
        f"group_{i}": VALID["config_groups"]["group_0"] | {"targets": one, "weights": {"num_bits": 8, "type": kind}}
        for i, (one, kind) in enumerate(zip(targets, ("float", "int", "int"), strict=False))
    }
    for group, strategy in zip(groups.values(), ("channel", "tensor", "channel"), strict=False):
        group["weights"] |= {"strategy": strategy, "symmetric": True}
    parsed = CompressedTensorsConfig.parse(VALID | {"config_groups": groups, "ignore": ignore})
    for name in NAMES:
        chosen = [group for group, one in zip(parsed.groups, targets) if is_match(name, linear, one, ignore)]
        found = {target: group for group in chosen for target in group.selection.targets}
        matched = match_targets(name, linear, found)
        assert parsed.form(name) is None
        assert parsed.weight_format(name) == (found[matched[0]].scheme.format if matched else None)
        assert [group for group in parsed.groups if name in group.selection] == chosen


def paths(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*path, key))


PIECES = st.sampled_from(["re:", "(a+)+", ".*", "(", "[", "\\d+", "b|", ")*", "?", "{9}", "$", "x"])
PATTERNS = st.lists(PIECES, max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | PATTERNS.map("".join),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
PATHS = [path for path in paths(VALID) if path]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), VALUES | st.just(...)), min_size=1, max_size=4))
@example([(("quant_method",), ["compressed-tensors"])])
@example([(("sparsity_config", "sparsity_structure"), {})])
@example([(("format",), "marlin-24"), (("sparsity_config",), 3)])
@example([(("format",), "marlin-24"), (("config_groups",), 3)])
@example([(("config_groups", "group_1", "format"), "marlin-24"), (("sparsity_config", "format"), {})])
@example([(("config_groups", "group_0", "weights", "symmetric"), float("nan"))])
def test_any_change_is_parsed_or_refused_with_the_key(changes):
    config = copy.deepcopy(VALID)
    for (*parents, last), value in changes:
        found = config
        try:
            for key in parents:
                found = found[key]
            if value is ...:
                del found[last]
            else:
                found[last] = value
        except (KeyError, IndexError, TypeError):  # an earlier change removed the place
            continue
    started = time.process_time()
    if is_24_checkpoint(config):
        try:
            parsed = CompressedTensorsConfig.parse(config)
        except RiaError as error:
            assert "quantization_config." in str(error)
        else:
            for name in NAMES:
                assert isinstance(name in parsed.pruned, bool)
                parsed.scheme(name)
    assert time.process_time() - started < 5, json.dumps(config)

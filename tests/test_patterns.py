"""Patterns of config files match what `re` says, and soon; those that could take long are refused."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ria_vllm.compressed_tensors.patterns import LONGEST, check_pattern, matches_pattern
from ria_vllm.errors import RiaError

# As compressed-tensors' and llm-compressor's recipes write them.
ORDINARY = [
    r".*lm_head",
    r".*mlp.gate$",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj$",
    r".*layers.*self_attn.*(q|k|v|o)_proj.*",
    r"(?:language_)?model\.layers\.[0-9]{1,3}\.mlp\.experts\.[^.]+\.w[123]",
    r".*q_proj$|.*k_proj$",
    r"^(model\.)?(vision_tower|multi_modal_projector)\..*",
]
REFUSED = [
    "(a+)+b", "(.*a){12}b", "(?:(?:a{99}){99}){99}", "(a|a)*b", "(?=(a+)+b)a", r"(a+)\1b", "(?i)a", "(", "[", "*",
    "a{100}", "[z-a]", "a" * (LONGEST + 1),
]  # fmt: skip
PIECES = st.sampled_from(["a", "b", ".*", "[ab]+", r"[^b]*", r"\d*", "(a|ab)", "(a*|b)?", "(?:.*a)?", "a{9,99}", "."])
LONG = ["a" * LONGEST, "ab" * (LONGEST // 2), "1" * LONGEST]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_are_what_re_says(pattern):
    names = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.gate", "vision_tower.block",
             "model.layers.3.mlp.up_proj", "language_model.layers.12.mlp.experts.7.w2"]  # fmt: skip
    check_pattern(pattern, "config.json")
    found = [matches_pattern(name, pattern, "config.json") for name in names]
    assert any(found) and found == [bool(re.match(pattern, name)) for name in names]


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_could_take_long_or_is_no_pattern_is_refused_by_name(pattern):
    with pytest.raises(RiaError, match=r"^config\.json: "):
        check_pattern(pattern, "config.json")


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join), st.lists(st.text("ab1.", max_size=7), max_size=9))
def test_every_allowed_pattern_is_what_re_says_and_ends_soon(pattern, names):
    check_pattern(pattern, "config.json")
    for name in names:
        assert matches_pattern(name, pattern, "config.json") == bool(re.match(pattern, name))
    started = time.process_time()
    for name in LONG:
        try:
            matches_pattern(name, pattern, "config.json")
        except RiaError as error:
            assert "takes too long" in str(error)
    assert time.process_time() - started < 5

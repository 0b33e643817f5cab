"""Patterns of config files: ordinary ones work, hostile ones are refused, and whatever is accepted ends soon."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ria_vllm.errors import RiaError
from ria_vllm.serve.patterns import LONGEST, compile_pattern

# As compressed-tensors' and llm-compressor's recipes write them.
ORDINARY = [
    r".*lm_head",
    r".*self_attn.*",
    r".*mlp.gate$",
    r".*block_sparse_moe.gate",
    r"model.layers.*proj",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj$",
    r".*layers.*self_attn.*(q|k|v|o)_proj.*",
    r".*layers.*mlp.*(gate|up|down|gate_up)_proj",
    r"^(?!.*vision).*layers\.(0|1|2|[1-9][0-9]+)\.",
    r"(?:language_)?model\.layers\.[0-9]{1,3}\.mlp\.experts\.[^.]+\.w[123]",
    r"visual.*",
    r"(model\.)?(vision_tower|multi_modal_projector)\..*",
    r"(?i).*LM_HEAD",
    r"(layers\.\d+\.)+mlp",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_patterns_work(text):
    names = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.gate", "visual.block", "layers.1.mlp"]
    pattern = compile_pattern(text, "config.json")
    assert [bool(pattern.match(name)) for name in names] == [bool(re.match(text, name)) for name in names]


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "(a*)*b",
        "(a|a)*b",
        "(a|ab)*c",
        "(.*a){12}b",
        "(?:a?){40}b",
        "a?" * 40 + "b",
        ".*.*.*.*.*b",
        ".*a.*a.*a.*a.*a.*b",
        "(a+?)+?b",
        "([a-z]+_?)*x",
        r"([^\s]+a)+b",
        r"(?a)([^\w]+é)+b",
        r"([^\d]*a)*b",
        "(?i)([^A]+a)+b",
        "(?i)([b-zſ]+s)+!",
        "(?:(?:){65535}){65535}",
        "(?:a|b|ab)*c",
        "(?i)(?:ab|Ab)*c",
        "(?i:(?:ab|Ab))*c",
        "(?i)(?:sx|ſx)*c",
        "(?i)(?:éx|Éx)*c",
        "(?=(a+)+b)a",
        r"(a+)\1b",
    ],
)
def test_patterns_that_backtrack_forever_are_refused(text):
    with pytest.raises(RiaError, match=r"^config\.json: the pattern"):
        compile_pattern(text, "config.json")


@pytest.mark.parametrize("text", ["(", "[", "*", "a{99999999999999999999}", "(?P<a", "(" * 240 + ")" * 240 + "("])
def test_what_is_not_a_pattern_is_named(text):
    with pytest.raises(RiaError, match=r"^config\.json, ignore: .* is not a regular expression"):
        compile_pattern(text, "config.json, ignore")


def test_long_patterns_are_refused():
    compile_pattern("a" * LONGEST, "config.json")
    with pytest.raises(RiaError, match="characters"):
        compile_pattern("a" * (LONGEST + 1), "config.json")


HARD = [
    r".*a.*a.*a.*", r".*a.*a.*b", r"(ab|a.)?.*[^b].*b$", r"a{100}", r"\w+a\w+b$", r"(a*b)*c", r"(?!.*b).*a.*b",
    r"(?:\w+\.)*x", r"(?i)(?:a|A|b|B|d|D|\.|0|1)*!",
]  # fmt: skip


@pytest.mark.parametrize("text", HARD)
def test_whatever_is_accepted_ends_soon(text):
    pattern = compile_pattern(text, "config.json")
    started = time.process_time()
    for name in ("a" * 150, "ab" * 75, "a" * 149 + "c"):
        pattern.match(name)
    assert time.process_time() - started < 2


PIECES = st.sampled_from(
    [
        "a",
        "b",
        ".",
        "[ab]",
        "[^b]",
        "[^\\s]",
        "(?i)",
        "A",
        "\\w",
        "(",
        "(?:",
        "(?!",
        ")",
        "|",
        "*",
        "+",
        "?",
        "*?",
        "{2,9}",
        "$",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_any_pattern_is_refused_or_ends_soon(text):
    try:
        pattern = compile_pattern(text, "config.json")
    except RiaError:
        return
    started = time.process_time()
    for name in ("a" * 100, "ab" * 50, "a" * 99 + "c"):
        pattern.match(name)
    assert time.process_time() - started < 5

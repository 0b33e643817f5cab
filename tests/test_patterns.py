"""Patterns of config files match what `re` says, and soon, however they were written."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ria_vllm.compressed_tensors.config import LONGEST_NAME
from ria_vllm.compressed_tensors.patterns import LONGEST, compile_pattern
from ria_vllm.errors import RiaError

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
    as_re_does(text, names)


HARD = [
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
    "(?:a|b|ab)*c",
    "(?i)(?:ab|Ab)*c",
    "(?i:(?:ab|Ab))*c",
    "(?i)(?:sx|ſx)*c",
    "(?i)(?:éx|Éx)*c",
    "(?=(a+)+b)a",
    r"\d*1\d*1\d*1\d*x",
    r"(?:\d?){2}\d*1\d*1\d*1\d*x",
    r".*a.*a.*b",
    r"(ab|a.)?.*[^b].*b$",
    r"(a*b)*c",
    r"(?!.*b).*a.*b",
    r"(?:\w+\.)*x",
    r"(?:(?!a*a*a*x)a)*y",
    r"(?i)(?:a|A|b|B|d|D|\.|0|1)*!",
]
FLAGS = [
    r"(?a:\w)",
    r"(?a:\w)\w",
    r"(?a:(?u:\w)\w)",
    r"(?a)(?u:\w)\w",
    r"(?a:\b)\W",
    r"(?ai:k)k",
    r"(?i:(?a:[k-z]))",
    r"(?a)(?iu:s)",
    r"(?a-i:\W)",
    r"(?a:(?:\w|x)+)é",
]
LONG = ["a" * LONGEST_NAME, "ab" * (LONGEST_NAME // 2), "a" * (LONGEST_NAME - 1) + "c", "1" * LONGEST_NAME]
SHORT = ["", "a", "b", "ab", "aab", "abc", "ba", "aaaab", "A.b", "1x", "111x", "11", "aé", "éx!", "aa c", "sx", "abab!"]


def as_re_does(text, names):
    pattern = compile_pattern(text, "config.json")
    assert [pattern.match(name) for name in names] == [bool(re.match(text, name)) for name in names]


def seconds(text, names):
    """Time to match, or to find out that it takes too long."""
    pattern, started = compile_pattern(text, "config.json"), time.process_time()
    for name in names:
        try:
            pattern.match(name)
        except RiaError as error:
            assert "takes too long to match a name. Use fewer repeats" in str(error)
    return time.process_time() - started


@pytest.mark.parametrize("text", HARD)
def test_patterns_with_millions_of_ways_match_soon(text):
    as_re_does(text, SHORT)
    assert seconds(text, LONG) < 0.5


@pytest.mark.parametrize("text", FLAGS)
def test_flags_of_a_part_replace_those_around_it(text):
    as_re_does(text, ["é", "éé", "aé", "éa", "aa", "k", "\u212a", "\u212ak", "kk", "K\u212a", "s", "ſ", "S", "!", "xé"])


def test_repeats_of_nothing_match_soon():
    """`re` itself needs hours and all of the memory."""
    assert seconds("(?:(?:){65535}){65535}", LONG) < 0.5


def test_what_takes_too_long_is_refused():
    text = r"(?:(?!(?:1?2?3?)*x)1)*y"
    as_re_does(text, SHORT)
    with pytest.raises(RiaError, match=r"^config\.json: the pattern .* takes too long to match a name\. Use fewer"):
        compile_pattern(text, "config.json").match("1" * LONGEST_NAME)


@pytest.mark.parametrize(("text", "part"), [(r"(a+)\1b", "groupref"), (r"(a)?(?(1)b|c)", "groupref_exists")])
def test_parts_that_depend_on_the_order_of_trying_are_refused(text, part):
    with pytest.raises(RiaError, match=rf"^config\.json: the pattern .* has a part \({part}\) that is not allowed"):
        compile_pattern(text, "config.json")


@pytest.mark.parametrize(
    "text", ["(", "[", "*", "a{99999999999999999999}", "(?P<a", "(" * 240 + ")" * 240 + "(", "(?au)a", "(?a)(?u)a"]
)
def test_what_is_not_a_pattern_is_named(text):
    with pytest.raises(RiaError, match=r"^config\.json, ignore: .* is not a regular expression"):
        compile_pattern(text, "config.json, ignore")


def test_long_patterns_are_refused():
    compile_pattern("a" * LONGEST, "config.json")
    with pytest.raises(RiaError, match="characters"):
        compile_pattern("a" * (LONGEST + 1), "config.json")


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
        "(?=",
        "(?<=",
        "(?<!",
        "(?i:",
        "(?-i:",
        "(?a:",
        "(?u:",
        "(?a)",
        ")",
        "|",
        "*",
        "+",
        "?",
        "*?",
        "{2,9}",
        "{3}",
        "$",
        "^",
        "\\b",
        "\\B",
        "\\d",
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=10).map("".join), st.lists(st.text("abAB .1cé\n", max_size=7), max_size=9))
def test_any_pattern_matches_as_in_re_and_ends_soon(text, names):
    try:
        compile_pattern(text, "config.json")
    except RiaError:
        return
    as_re_does(text, names)
    assert seconds(text, LONG) < 2

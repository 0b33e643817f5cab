"""The zoo: a few toys, one for each mechanism, and the results of all that `make test-zoo` has written."""

import json
import re
import sys
from pathlib import Path

import pytest
import transformers
from zoo.agreement import agreement_of_two
from zoo.check import problems
from zoo.run import run_batch, versions
from zoo.table import PAGE, RESULTS, page
from zoo.toy import Toy, fingerprint, merged
from zoo.toys import TOYS

MAKEFILE = Path(__file__).parents[2] / "Makefile"
REPRESENTATIVE = [name for name, toy in TOYS.items() if toy.mechanism]


def test_the_page_is_what_the_results_and_the_toys_say():
    assert PAGE.read_text() == page(json.loads(RESULTS.read_text())), "PYTHONPATH=tests python -m zoo.table"


def test_the_results_are_of_all_toys_and_as_promised():
    results = json.loads(RESULTS.read_text())
    assert results["types"].keys() == TOYS.keys()
    for name, toy in TOYS.items():
        record = results["types"][name]
        assert not problems(toy, record), name
        assert record["toy"] == fingerprint(name, toy), f"the toy has changed: make test-zoo ZOO={name}"
        assert record["versions"] == results["versions"], f"other libraries: make test-zoo ZOO={name}"
        assert bool(toy.engine) == bool(toy.run) and (toy.shaped or not toy.zeros), f"{name} does not say why"


def test_the_results_are_of_the_installed_versions():
    """That includes torch, of which vLLM requires one version. transformers' bug fixes count as the same."""
    vllm = re.search(r"^VLLM_VERSION := (\S+)$", MAKEFILE.read_text(), re.MULTILINE)[1]
    installed, recorded = versions(), json.loads(RESULTS.read_text())["versions"]
    if installed["vllm"].partition("+")[0] != vllm:
        pytest.skip(f"not the vLLM of `make test`, which is {vllm}: make test-versions has others on purpose")
    if not Path(transformers.__file__).is_relative_to(sys.prefix):
        pytest.skip(f"transformers is in {transformers.__file__}: make test-versions puts another one there")
    minor = installed["transformers"].rpartition(".")[0]
    assert recorded["vllm"] == installed["vllm"] and recorded["transformers"].startswith(f"{minor}."), "make test-zoo"


@pytest.mark.parametrize(
    "changed, other",
    [
        ({"settings": {"hidden_size": 256}}, True),
        ({"model_type": "mistral"}, True),
        ({"dtype": "bfloat16"}, True),
        ({"stays_dense": {"conv": "odd-sized"}}, True),
        ({"shaped": "without biases"}, False),
        ({"not_served": "no kernel"}, True),
    ],
)
def test_a_fingerprint_changes_with_what_can_come_out_differently(changed, other):
    assert (fingerprint("llama", Toy(**changed)) != fingerprint("llama", Toy())) == other
    assert fingerprint("llama", Toy(not_served="one reason")) == fingerprint("llama", Toy(not_served="the other"))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return run_batch(REPRESENTATIVE, tmp_path_factory.mktemp("zoo"), dense_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVE, ids=lambda name: f"{name}: {TOYS[name].mechanism}")
def test_a_mechanism(records, name):
    assert not problems(TOYS[name], records[name])


GOOD = {
    "compress": {"share": 1.0, "share_of_all": 0.96, "folded": ["o_proj"], "gathered": [], "dense": {}},
    "dense": {"text": {"median": 1e-6, "largest": 1e-5, "same": 1.0}},
    "served": {"text": {"median": 1e-6, "largest": 1e-5, "same": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"build": {"error": "no such config"}}, "no such config"),
        ({"compress": {"error": "RiaError: refused"}}, "refused"),
        ({"compress": GOOD["compress"] | {"share": 0.94}}, "only 94.0%"),
        ({"compress": GOOD["compress"] | {"folded": []}}, "no fold"),
        ({"compress": GOOD["compress"] | {"gathered": ["layers.*.mlp.experts.*.down_proj"]}}, "down_proj gathers"),
        ({"compress": GOOD["compress"] | {"gathered": ["layers.*.linear_attn.q_proj", "h.*.mamba.out_proj"]}}, None),
        ({"dense": {"text": {"median": 0.5, "largest": 2.0, "same": 0.1}}}, "dense toy"),
        ({"served": {"text": {"median": 0.0, "largest": 0.02, "same": 1.0}}}, "served is wrong"),
        ({"served": {"text": {"median": 2e-5, "largest": 2e-5, "same": 1.0}}}, "dense toy's 1.0e-06"),
        ({"served": {"text": {"median": 1e-6, "largest": 2e-4, "same": 1.0}}}, "its largest is 2.0e-04"),
        ({"served": {"text": {"median": float("nan"), "largest": 0.0, "same": 1.0}}}, "served is wrong"),
        ({"served": GOOD["served"] | {"image": {"median": 0.5, "largest": 2.0, "same": 0.1}}}, "image"),
        ({"served": {"error": "RuntimeError: ended"}}, "ended"),
    ],
)
def test_what_is_wrong_is_said(change, said):
    found = problems(Toy(), GOOD | change)
    assert not found if said is None else said in found[0]


def test_a_toy_says_what_it_cannot_do():
    unfolded = GOOD | {"compress": GOOD["compress"] | {"folded": []}}
    assert not problems(Toy(no_fold="a convolution"), unfolded)
    gathered = GOOD | {"compress": GOOD["compress"] | {"gathered": ["layers.*.self_attn.o_proj"]}}
    named = Toy(gathers={"self_attn.o_proj": "a norm"})
    assert problems(Toy(), gathered) and not problems(named, gathered) and problems(named, GOOD)
    alone = {"compress": GOOD["compress"]}
    assert problems(Toy(), alone) and not problems(Toy(not_served="no kernel"), alone)


def test_a_toy_says_why_it_differs_from_transformers():
    def dense(largest):
        return GOOD | {"dense": {"text": {"median": 1e-6, "largest": largest, "same": 1.0}}}

    assert "differs" in problems(Toy(), dense(2e-4))[0] and not problems(Toy(differs="rounding"), dense(2e-4))
    assert "no longer" in problems(Toy(differs="rounding"), dense(9e-5))[0] and not problems(Toy(), dense(9e-5))
    far = {"text": {"median": 0.5, "largest": 2.0, "same": 0.1}}
    assert problems(Toy(differs="rounding"), GOOD | {"dense": far})
    ended = GOOD | {"dense": {"error": "RuntimeError: ended"}}
    assert not any("no longer" in problem for problem in problems(Toy(differs="rounding"), ended))


def test_a_toy_in_bfloat16_is_compared_within_vllm_too():
    toy, far = Toy(dtype="bfloat16", differs="rounding"), {"text": {"median": 0.01, "largest": 0.04, "same": 1.0}}
    record = GOOD | {"dense": far, "served": far}
    assert not problems(toy, record | {"exported": GOOD["dense"]})
    assert "not run" in problems(toy, record)[0]
    assert "pruned folder and the exported one: text" in problems(toy, record | {"exported": far})[0]


def test_two_runs_of_vllm_are_compared_until_they_choose_another_token():
    def results(tokens, logprobs):
        return [{"prompt_ids": [3, 4, 5], "prompt": [-1.0, -2.0], "tokens": tokens, "logprobs": logprobs}] * 4

    found = agreement_of_two(results([6, 7, 8], [-1.0, -3.0, -1.0]), results([6, 9, 8], [-1.0, -3.5, -9.0]))
    numbers = {"median": 0.0, "largest": 0.5, "same": 0.33}
    assert found == {"text": numbers, "image": numbers}


def test_edits_reach_nested_configs():
    config = {"a": 1, "text_config": {"b": 2, "c": 3}}
    assert merged(config, {"d": 4, "text_config": {"c": 5}}) == {"a": 1, "d": 4, "text_config": {"b": 2, "c": 5}}

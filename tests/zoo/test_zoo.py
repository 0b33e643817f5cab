"""The zoo: a few toys, one for each mechanism, and the results of all that `make test-zoo` has written."""

import json
import re
import sys
from pathlib import Path

import pytest
import transformers
from zoo.check import problems
from zoo.run import run_batch, versions
from zoo.table import PAGE, RESULTS, page
from zoo.toy import Toy, fingerprint
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

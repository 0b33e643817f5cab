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
from zoo.toy import fingerprint
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

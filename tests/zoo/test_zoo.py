"""The zoo: a few toys, one for each mechanism, and the results of all that `make test-zoo` has written."""

import json

import pytest
from zoo.check import problems
from zoo.run import run_batch
from zoo.table import PAGE, RESULTS, page
from zoo.toys import TOYS

REPRESENTATIVE = [name for name, toy in TOYS.items() if toy.mechanism]


def test_the_page_shows_the_results():
    assert PAGE.read_text() == page(PAGE.read_text(), json.loads(RESULTS.read_text()))


def test_every_type_has_run():
    assert sorted(json.loads(RESULTS.read_text())["types"]) == sorted(TOYS)


@pytest.mark.parametrize("name", TOYS)
def test_the_results_are_as_promised(name):
    assert not problems(TOYS[name], json.loads(RESULTS.read_text())["types"][name])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return run_batch(REPRESENTATIVE, tmp_path_factory.mktemp("zoo"), dense_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVE, ids=lambda name: f"{name}: {TOYS[name].mechanism}")
def test_a_mechanism(records, name):
    assert not problems(TOYS[name], records[name])

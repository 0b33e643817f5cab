"""The order of servers and loads, and what a failure leaves, with vLLM replaced."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark import comparison, load
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.load import REPORTED, Workload
from ria_vllm.serve.benchmark.quality import Quality, Unanswered
from ria_vllm.serve.benchmark.server import Server
from ria_vllm.serve.benchmark.sides import Side

WAYS = tuple(Side(name, name.upper(), 1) for name in "abc")


def comparison_of(sides, folder, concurrency, repetitions=3, **settings):
    return Comparison(sides, Workload(8, 8, 4), concurrency, repetitions, folder=folder, tokenizer="S", **settings)


@pytest.fixture
def pretend(monkeypatch):
    """vLLM replaced: `events` are what happens to which model; the load called `broken` fails. The servers are those of
    `processes`."""
    state = SimpleNamespace(events=[], broken=None, alive=[], processes={})

    @contextmanager
    def running_server(model, log, arguments, monitor):
        state.events.append(f"start {model} {' '.join(arguments)}".strip())
        state.alive.append(model)
        try:
            yield Server(f"http://{model}", model, state.processes.get(model), 1.0)
        finally:
            state.alive.remove(model)
            state.events.append(f"end {model}")

    def online(running, tokenizer, workload, users, seed, log, monitor):
        name = f"{running.model_name}{users}, seed {seed}"
        if name == state.broken:
            raise RiaError("1 of 4 requests failed")
        state.events.append(name)
        return dict.fromkeys(REPORTED, 10.0) | {"memory_bytes": 10}

    monkeypatch.setattr(comparison, "running_server", running_server)
    monkeypatch.setattr(load, "online", online)
    return state


def test_one_server_at_a_time(pretend, tmp_path):
    """Every repetition starts each side once and loads it with the same prompts; each side goes first once."""
    comparison_of(WAYS, tmp_path, [1, 4]).measure()
    expected = []
    for repetition, order in enumerate(("ABC", "BCA", "CAB")):
        for model in order:
            loads = [f"{model}{users}, seed {1000 * repetition + n}" for n, users in enumerate((1, 4))]
            expected += [f"start {model}", *loads, f"end {model}"]
    assert pretend.events == expected


def test_a_failure_ends_the_server_and_leaves_what_was_measured(pretend, tmp_path):
    pretend.broken = "B1, seed 1000"
    with pytest.raises(RiaError):
        comparison_of(WAYS[:2], tmp_path, [1]).measure()
    runs = json.loads((tmp_path / "bench.json").read_text())["runs"]
    assert [one["side"] for one in runs] == ["a", "b"] and not pretend.alive


def test_arguments_of_one_side_reach_its_server_only(pretend, tmp_path):
    sides = [WAYS[0], Side("b", "B", 1, ("--dtype", "float32"))]
    comparison_of(sides, tmp_path, [1], 1, serve_arguments=["--all"]).measure()
    assert [event for event in pretend.events if "start" in event] == ["start A --all", "start B --all --dtype float32"]


@pytest.mark.parametrize(("silent", "process"), [("b", None), ("b", object()), ("a", None)])
def test_what_a_server_that_ran_already_does_not_tell_is_left_out(silent, process, pretend, tmp_path, capsys):
    """But not what others are compared with, nor of a server of our own."""

    def check(name, server):
        if name == silent:
            raise Unanswered(f"{name}: no answer\n(400)")

    pretend.processes["B"] = process
    text = SimpleNamespace(seq_len=8, check=check, measure=lambda *_: Quality(10.0, 31, 0.1, 0.2))
    compared = comparison_of(WAYS, tmp_path, [1], 1, text=text)
    if silent == "b" and process is None:
        compared.measure()
        assert set(compared.measured.quality) == {"a", "c"} and len(compared.measured.runs) == 3
        assert "b: no answer (400) Its perplexity and KL are left out.\n" in capsys.readouterr().out
    else:
        with pytest.raises(Unanswered):
            compared.measure()

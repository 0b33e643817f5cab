"""The order of servers and loads, and what a failure leaves, with vLLM replaced."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark import comparison, load, server
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.load import Outcome, Workload
from ria_vllm.serve.benchmark.quality import Incomparable, Quality
from ria_vllm.serve.benchmark.results import Side
from ria_vllm.serve.benchmark.server import Server


def comparison_of(sides, folder, concurrency=(), **settings):
    settings = {"repetitions": 3, "say": lambda line: None} | settings
    return Comparison(sides, Workload(8, 8, 4), concurrency, seed=0, folder=folder, tokenizer="S", **settings)


def test_sides_alternate_and_every_run_is_on_disk_at_once(tmp_path, monkeypatch):
    """The order of the runs, and what an interruption in the middle leaves."""
    calls = []

    def measured(model, *_, **__):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(model)
        return Outcome({"output_tokens_per_s": 10.0, "requests_per_s": 1.0}, None, 10)

    monkeypatch.setattr(load, "offline", measured)
    sides = (Side("dense", "D", 2), Side("sparse", "S", 1))
    with pytest.raises(KeyboardInterrupt):
        comparison_of(sides, tmp_path).measure()
    assert calls == ["D", "S", "S", "D", "D"]
    content = json.loads((tmp_path / "bench.json").read_text())
    assert not content["complete"] and len(content["runs"]) == 5


WAYS = tuple(Side(name, name.upper(), 1) for name in "abc")


@pytest.fixture
def pretend(monkeypatch):
    """vLLM replaced: `events` are what happens to which model; a model in `broken` does not start, and each server
    takes a gigabyte."""
    state = SimpleNamespace(events=[], broken=set(), alive=[])

    @contextmanager
    def running_server(model, log, arguments, timeout, monitor):
        if model in state.broken:
            raise RiaError(f"vllm serve {model} ended while starting. The end of {log}:\nsecret")
        state.events.append(f"start {model} {' '.join(arguments)}".strip())
        state.alive.append(model)
        process = SimpleNamespace(memory=lambda: 1 << 30)
        try:
            yield Server(f"http://{model}", model, process, 1.0)
        finally:
            state.alive.remove(model)
            state.events.append(f"end {model}")

    def online(running, tokenizer, workload, users, seed, log, monitor):
        state.events.append(f"{running.model_name}{users}, seed {seed}")
        return Outcome({"output_tokens_per_s": 10.0, "requests_per_s": 1.0, "tpot_p50_ms": 3.0}, None, 10)

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
    assert json.loads((tmp_path / "bench.json").read_text())["complete"]


def test_servers_that_stay_alternate_at_every_load(pretend, tmp_path):
    comparison_of(WAYS, tmp_path, [1, 4], repetitions=2, keep_servers=True).measure()
    loads = [f"{model}{users}" for order in ("ABC", "BCA") for users in (1, 4) for model in order]
    assert [event.split(",")[0] for event in pretend.events] == [
        "start A", "start B", "start C", *loads, "end C", "end B", "end A",
    ]  # fmt: skip


def test_servers_that_do_not_fit_run_one_at_a_time(pretend, tmp_path, monkeypatch):
    """Memory for two: the third is not started beside them, and the results say so."""
    available = lambda: SimpleNamespace(available=(3.5 - len(pretend.alive) - 1) * (1 << 30))  # noqa: E731
    monkeypatch.setattr(comparison.psutil, "virtual_memory", available)
    said = []
    comparison_of(WAYS, tmp_path, [1], repetitions=1, keep_servers=True, say=said.append).measure()
    assert pretend.events[:4] == ["start A", "start B", "end B", "end A"]
    assert pretend.events[4:7] == ["start A", "A1, seed 0", "end A"] and len(pretend.events) == 4 + 9
    note = "One server at a time, although all were asked for: with 2 alive"
    assert note in (tmp_path / "bench.md").read_text() and any(line.startswith(f"warning: {note}") for line in said)


@pytest.mark.parametrize("keep", [False, True])
def test_a_side_that_cannot_start_is_named_and_the_others_are_measured(pretend, tmp_path, keep):
    pretend.broken.add("B")
    bench = comparison_of(WAYS, tmp_path, [1], repetitions=2, keep_servers=keep)
    bench.measure()
    (point,) = bench.measured.points()
    assert point.figures["b"] is None and point.figures["a"] and point.figures["c"] and not point.ratios["b"]
    (line,) = bench.measured.failure_lines()
    assert line.startswith("b, 1 users: vllm serve B ended while starting.") and "secret" not in line
    assert bool(bench.measured.notes) == keep


def test_arguments_of_one_side_reach_its_server_only(pretend, tmp_path):
    sides = [WAYS[0], Side("b", "B", 1, ("--dtype", "float32"))]
    comparison_of(sides, tmp_path, [1], repetitions=1, serve_arguments=["--all"]).measure()
    assert [event for event in pretend.events if "start" in event] == ["start A --all", "start B --all --dtype float32"]


def text_of(measured, checked=lambda name: None):
    """A text whose measurements are `measured`: name -> Quality or the error."""
    text = SimpleNamespace(check=lambda name, running: checked(name), events=[])

    def measure(name, running, monitor):
        text.events.append(name)
        if isinstance(measured[name], Exception):
            raise measured[name]
        return measured[name]

    text.measure = measure
    return text


def test_quality_is_measured_once_after_the_loads(pretend, tmp_path):
    quality = Quality(10.0, 31, 1, 32, 8, 0.1, 0.2)
    text = text_of({"a": quality, "b": RiaError("b: the server ended"), "c": quality})
    bench = comparison_of(WAYS, tmp_path, [1], repetitions=2, text=text)
    bench.measure()
    assert text.events == ["a", "b", "c"] and list(bench.measured.quality) == ["a", "c"]
    assert bench.measured.failure_lines() == ["b, perplexity: b: the server ended"]
    assert json.loads((tmp_path / "bench.json").read_text())["quality"]["c"]["perplexity"] == 10


@pytest.mark.parametrize("keep", [False, True])
def test_texts_that_cannot_be_compared_stop_everything(pretend, tmp_path, keep):
    """Before the second side is loaded: hours of measurements would be useless."""

    def checked(name):
        if name == "b":
            raise Incomparable("b: splits the text into different tokens than a")

    bench = comparison_of(
        WAYS, tmp_path, [1], text=text_of({"a": Quality(1, 1, 1, 2, 8, 0, 0)}, checked), keep_servers=keep
    )
    with pytest.raises(Incomparable):
        bench.measure()
    assert not pretend.alive and not any(event.startswith("B1") for event in pretend.events)


@pytest.mark.parametrize("cached", ["True", "False", None])
def test_a_borrowed_server_with_a_prefix_cache_is_named(pretend, tmp_path, monkeypatch, cached):
    """Prompts of an earlier benchmark would be answered from it, on this side only. A server need not tell."""

    def get(url, timeout):
        if url.endswith("/v1/models"):
            return b'{"data": [{"id": "B"}]}'
        if cached is None:
            raise OSError
        return f'# HELP x\nvllm:cache_config_info{{block_size="16",enable_prefix_caching="{cached}"}} 1.0'.encode()

    monkeypatch.setattr(server, "get", get)
    compared = comparison_of(WAYS, tmp_path, [1], urls={"b": "http://there"})
    compared.measure()
    assert [note.partition(" It answers")[0] for note in compared.measured.notes] == (
        ["b: the server at http://there has a prefix cache."] if cached == "True" else []
    )

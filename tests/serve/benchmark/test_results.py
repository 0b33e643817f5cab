"""Medians and paired ratios; a failure never yields a number."""

import json

import pytest

from ria_vllm.serve.benchmark.load import Outcome
from ria_vllm.serve.benchmark.plot import plot
from ria_vllm.serve.benchmark.results import Run, Side, as_markdown, failure_lines, summarise, table, write

SIDES = (Side("dense", "models/a", 2_000_000_000), Side("sparse", "models/b", 1_200_000_000))


def run(side: str, repetition: int, users: int | None, rate: float | None, memory: int | None = None) -> Run:
    if rate is None:
        return Run(side, repetition, users, Outcome(None, "7 of 8 requests failed"))
    figures = {"output_tokens_per_s": rate, "requests_per_s": rate / 10, "ttft_p50_ms": 1000 / rate}
    figures |= {"ttft_p99_ms": 2000 / rate, "tpot_p50_ms": 100 / rate, "tpot_p99_ms": 150 / rate}
    return Run(side, repetition, users, Outcome(figures, None, memory))


RUNS = [
    run("dense", 0, 1, 100, 5_000_000_000), run("sparse", 0, 1, 130, 4_000_000_000),
    run("sparse", 1, 1, 150), run("dense", 1, 1, 125),
    run("dense", 2, 1, 110), run("sparse", 2, 1, 154),
]  # fmt: skip


def test_medians_and_ratios_within_a_repetition():
    (point,) = summarise(RUNS)
    assert point.figures["dense"]["output_tokens_per_s"] == 110
    assert point.figures["sparse"]["output_tokens_per_s"] == 150
    ratio = point.ratios["output_tokens_per_s"]
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.3, 1.2, 1.4))  # 1.3, 1.2, 1.4 in order
    assert point.ratios["tpot_p50_ms"].median == pytest.approx(1 / 1.3)
    assert point.memory == {"dense": 5_000_000_000, "sparse": 4_000_000_000}


def test_one_failed_run_removes_all_figures_of_its_point():
    more = [run("dense", 3, 1, None), run("sparse", 3, 1, 140), run("dense", 0, 4, 9), run("sparse", 0, 4, 9)]
    points = summarise([*RUNS, *more])
    assert points[0].figures["dense"] is None and points[0].ratios == {} and points[0].memory["dense"] is None
    assert points[1].ratios["output_tokens_per_s"].median == 1
    titles, rows = table(points, SIDES)
    dense = next(row for row in rows if row[:2] == ["1", "dense"])
    assert dense[2:-1] == ["failed"] * (len(titles) - 4) + ["-"]
    assert next(row for row in rows if row[:2] == ["1", "ratio"])[2:-1] == ["-"] * (len(titles) - 3)
    assert failure_lines(points) == ["dense, 1 users: 7 of 8 requests failed"]


def test_a_side_that_never_ran_has_no_figures():
    (point,) = summarise(RUNS[:1])
    assert point.figures["sparse"] is None and point.ratios == {}
    assert "not run" in table([point], SIDES)[1][1]


def test_only_failures():
    titles, rows = table(summarise([run("dense", 0, 1, None), run("sparse", 0, 1, None)]), SIDES)
    assert len(titles) == len(rows[0]) == len(rows[1]) == len(rows[2])
    assert not any(character.isdigit() for row in rows[:2] for cell in row[1:-1] for character in cell)


def test_files(tmp_path):
    write(tmp_path, RUNS, SIDES, {"cores": 2, "gpus": []}, {"input_len": 32, "data": None}, complete=True)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["complete"] and len(content["runs"]) == 6 and content["sides"]["sparse"]["bytes"] == 1_200_000_000
    assert content["points"][0]["ratios"]["output_tokens_per_s"]["median"] == pytest.approx(1.3)
    text = (tmp_path / "bench.md").read_text()
    assert "| 1 | ratio | 1.300 (1.200 to 1.400)" in text and "0.600" in text and "input_len: 32" in text
    assert "data" not in text and "Interrupted" not in text
    assert "Interrupted" in as_markdown(RUNS, SIDES, {}, {}, complete=False)


@pytest.mark.parametrize("users", [1, None])
def test_plot(tmp_path, users):
    pytest.importorskip("matplotlib")
    runs = [Run(r.side, r.repetition, users, r.outcome) for r in RUNS]
    plot(tmp_path / "bench.png", runs, "model")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_failures_alone_make_no_plot(tmp_path):
    plot(tmp_path / "bench.png", [run("dense", 0, 1, None)], "model")
    assert not (tmp_path / "bench.png").exists()

"""Medians and paired ratios; a failure never yields a number."""

import json
import random
from dataclasses import replace

import pytest

from ria_vllm.serve.benchmark import quality_plot
from ria_vllm.serve.benchmark.load import Outcome
from ria_vllm.serve.benchmark.plot import lines, plot
from ria_vllm.serve.benchmark.quality import Quality
from ria_vllm.serve.benchmark.results import Measured, Run, Side, summarise
from ria_vllm.serve.benchmark.table import as_markdown, table, write

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
    ratio = point.ratios["sparse"]["output_tokens_per_s"]
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.3, 1.2, 1.4))  # 1.3, 1.2, 1.4 in order
    assert point.ratios["sparse"]["tpot_p50_ms"].median == pytest.approx(1 / 1.3)
    assert point.memory == {"dense": 5_000_000_000, "sparse": 4_000_000_000}


def test_one_failed_run_removes_all_figures_of_its_point():
    more = [run("dense", 3, 1, None), run("sparse", 3, 1, 140), run("dense", 0, 4, 9), run("sparse", 0, 4, 9)]
    measured = Measured(SIDES, [*RUNS, *more])
    points = measured.points()
    assert (
        points[0].figures["dense"] is None and points[0].ratios == {"sparse": {}} and points[0].memory["dense"] is None
    )
    assert points[1].ratios["sparse"]["output_tokens_per_s"].median == 1
    titles, rows = table(measured)
    dense = next(row for row in rows if row[:2] == ["1", "dense"])
    assert dense[2:-1] == ["failed"] * (len(titles) - 4) + ["-"]
    assert next(row for row in rows if row[:2] == ["1", "ratio"])[2:-1] == ["-"] * (len(titles) - 3)
    assert measured.failure_lines() == ["dense, 1 users: 7 of 8 requests failed"]


def test_a_side_that_never_ran_has_no_figures():
    (point,) = summarise(RUNS[:1])
    assert point.figures["sparse"] is None and point.ratios == {"sparse": {}}
    assert "not run" in table(Measured(SIDES, RUNS[:1]))[1][1]


def test_only_failures():
    titles, rows = table(Measured(SIDES, [run("dense", 0, 1, None), run("sparse", 0, 1, None)]))
    assert len(titles) == len(rows[0]) == len(rows[1]) == len(rows[2])
    assert not any(character.isdigit() for row in rows[:2] for cell in row[1:-1] for character in cell)


def test_files(tmp_path):
    write(tmp_path, Measured(SIDES, RUNS), {"cores": 2, "gpus": []}, {"input_len": 32, "data": None}, complete=True)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["complete"] and len(content["runs"]) == 6 and content["sides"]["sparse"]["bytes"] == 1_200_000_000
    assert content["points"][0]["ratios"]["output_tokens_per_s"]["median"] == pytest.approx(1.3)
    text = (tmp_path / "bench.md").read_text()
    assert "| 1 | ratio | 1.300 (1.200 to 1.400)" in text and "0.600" in text and "input_len: 32" in text
    assert "data" not in text and "Interrupted" not in text
    assert "Interrupted" in as_markdown(Measured(SIDES, RUNS), {}, {}, complete=False)


QUALITY = Quality(perplexity=40.0, tokens=1023, windows=1, seq_len=1024, top_logprobs=64, kl=0.0, unlisted=None)
WAYS = (*(Side(name, f"models/{name}", size) for name, size in (("bf16", 200), ("w8a8", 100))), Side("ours", "o", 50))


def ways() -> Measured:
    """Three sides, of which one failed with 4 users, and one has no perplexity."""
    rates = {"bf16": (10, 30), "w8a8": (20, 45), "ours": (25, None)}
    runs = [
        run(side, r, users, rate) for r in (0, 1) for side, pair in rates.items() for users, rate in zip((1, 4), pair)
    ]
    runs.append(run("w8a8", 2, 1, 30))
    runs.append(run("bf16", 2, 1, 10))
    quality = {"bf16": QUALITY, "w8a8": replace(QUALITY, perplexity=40.5, kl=0.0125, unlisted=0.034)}
    return Measured(WAYS, runs, quality, {"ours": "the server ended"}, ["A note."])


def test_several_sides_have_a_row_each_and_a_ratio_to_the_first():
    titles, rows = table(ways())
    assert titles[:4] == ["users", "side", "output tok/s", "/ bf16"] and titles[-4:-2] == ["perplexity", "KL"]
    assert [row[:2] for row in rows] == [[users, side.name] for users in "14" for side in WAYS]
    assert [row[3] for row in rows] == ["1", "2.000 (2.000 to 3.000)", "2.500", "1", "1.500", "failed"]
    assert [row[-4:-2] for row in rows[:3]] == [["40", "0"], ["40.5", "0.0125"], ["failed", "failed"]]
    assert all(len(row) == len(titles) for row in rows)
    assert not any(character.isdigit() for cell in rows[5][2:-1] for character in cell)


def test_markdown_of_several_sides():
    text = as_markdown(ways(), {}, {}, complete=True)
    assert "At most 3.40% of bf16's probability" in text and "1023 tokens in 1 windows of 1024" in text
    assert (
        "the 64 likeliest tokens of both" in text
        and "A note." in text
        and "- ours, perplexity: the server ended" in text
    )
    assert "- ours, 4 users: 7 of 8 requests failed" in text


def test_failures_alone_of_several_sides():
    titles, rows = table(Measured(WAYS, [run(side.name, 0, 1, None) for side in WAYS]))
    assert [len(row) for row in rows] == [len(titles)] * 3


def test_a_pair_with_quality():
    quality = {"dense": QUALITY, "sparse": replace(QUALITY, perplexity=60.0, kl=0.5, unlisted=0.01)}
    titles, rows = table(Measured(SIDES, RUNS, quality))
    at = titles.index("perplexity")
    assert [row[at : at + 2] for row in rows] == [["40", "0"], ["60", "0.5"], ["1.500", "-"]]
    assert [row[1] for row in rows] == ["dense", "sparse", "ratio"] and "/ dense" not in titles


def test_json_of_a_pair_is_as_it_was_with_more_keys(tmp_path):
    for measured, folder in ((Measured(SIDES, RUNS), "pair"), (ways(), "ways")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, measured, {}, {}, complete=True)
    pair, several = (json.loads((tmp_path / folder / "bench.json").read_text()) for folder in ("pair", "ways"))
    (point,) = pair["points"]
    assert {"complete", "machine", "options", "sides", "points", "runs"} <= set(pair)
    assert {"concurrency", "figures", "failures", "memory", "ratios"} <= set(point)
    assert point["ratios"] == point["ratios_by_side"]["sparse"] and pair["reference"] == "dense"
    assert all("ratios" not in point for point in several["points"]) and several["reference"] == "bf16"
    assert several["points"][0]["ratios_by_side"]["ours"]["output_tokens_per_s"]["median"] == 2.5
    assert several["quality"]["w8a8"]["kl"] == 0.0125 and several["quality_failures"] == {"ours": "the server ended"}


@pytest.mark.parametrize("users", [1, None])
def test_plot(tmp_path, users):
    pytest.importorskip("matplotlib")
    for measured in (Measured(SIDES, RUNS), ways()):
        measured.runs = [Run(r.side, r.repetition, users, r.outcome) for r in measured.runs if r.concurrency == 1]
        plot(tmp_path / "bench.png", measured, "model")
        assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_failures_alone_make_no_plot(tmp_path):
    plot(tmp_path / "bench.png", Measured(SIDES, [run("dense", 0, 1, None)]), "model")
    assert not (tmp_path / "bench.png").exists()


def drawn(axis) -> dict[str, list[tuple[float, float]]]:
    """Label of a line -> its points."""
    found = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in axis.get_lines()}
    return {label: points for label, points in found.items() if not label.startswith("_")}


def test_lines_over_users():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    measured = ways()
    speed, _, time = lines(pyplot, measured.points(), measured).axes
    assert drawn(speed) == {"bf16": [(1, 10), (4, 30)], "w8a8": [(1, 20), (4, 45)], "ours": [(1, 25)]}
    assert drawn(time)["bf16"] == [(1, 10), (4, pytest.approx(100 / 30))]


def test_speed_against_quality():
    """A line for each side with speed and quality, a point for each number of users that has figures."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    measured = ways()
    measured.quality["ours"] = replace(QUALITY, perplexity=60.0, kl=None)  # the reference's own lists were lost
    speed, speed_kl, _, time_kl = quality_plot.draw(pyplot, measured).axes
    assert drawn(speed) == {"bf16": [(40, 10), (40, 30)], "w8a8": [(40.5, 20), (40.5, 45)], "ours": [(60, 25)]}
    assert drawn(speed_kl) == {"bf16": [(0, 10), (0, 30)], "w8a8": [(0.0125, 20), (0.0125, 45)]}
    assert drawn(time_kl)["w8a8"] == [(0.0125, 5), (0.0125, pytest.approx(100 / 45))]
    assert speed.get_xlabel() == "perplexity (lower is better)" and "from bf16" in speed_kl.get_xlabel()
    fastest = [
        list(zip(line.get_xdata(), line.get_ydata())) for line in speed.get_lines() if line.get_linestyle() == ":"
    ]
    assert fastest == [[(40, 10), (40.5, 20), (60, 25)], [(40, 30), (40.5, 45)]]


def test_the_frontier():
    """Against brute force."""
    generator = random.Random(0)
    for higher in (True, False):
        points = [(generator.randrange(8), generator.randrange(8)) for _ in range(20)]
        sign = 1 if higher else -1
        expected = {
            p for p in points
            if not any(q != p and q[0] <= p[0] and sign * q[1] >= sign * p[1] for q in points)
        }  # fmt: skip
        assert quality_plot.frontier(points, higher) == sorted(expected)


def test_no_quality_makes_no_second_plot(tmp_path):
    quality_plot.plot(tmp_path / "quality.png", Measured(SIDES, RUNS), "model")
    assert not (tmp_path / "quality.png").exists()
    quality_plot.plot(tmp_path / "quality.png", ways(), "model")
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"

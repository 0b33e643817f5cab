"""Medians and paired ratios, in the table, in bench.json and in the plot."""

import json

import pytest

from ria_vllm.serve.benchmark.quality import Quality
from ria_vllm.serve.benchmark.results import Measured, Run, summary, table, write
from ria_vllm.serve.benchmark.sides import Side

SIDES = [
    Side("dense", "a/dense", 2_000_000_000),
    Side("w8a8", "a/w8a8", None),
    Side("sparse", "a/b", 1_200_000_000, pruned="8:16 W8A8"),
]


def run(side: str, repetition: int, users: int, rate: float, memory: float = 4e9) -> Run:
    figures = {"output_throughput": rate, "request_throughput": rate / 10, "p50_ttft_ms": 1000 / rate}
    figures |= {"p99_ttft_ms": 2000 / rate, "p50_tpot_ms": 100 / rate, "p99_tpot_ms": 150 / rate}
    return Run(side, repetition, users, figures | {"memory_bytes": memory})


RUNS = [
    run("dense", 0, 1, 100, 5e9), run("sparse", 0, 1, 130, 4e9),
    run("sparse", 1, 1, 150), run("dense", 1, 1, 125, 5e9),
    run("dense", 2, 1, 110, 5e9), run("sparse", 2, 1, 154),
    run("dense", 0, 4, 200), run("sparse", 1, 4, 100),
]  # fmt: skip
QUALITY = {"dense": Quality(40.0, 1023, 0.0, 0.0), "sparse": Quality(60.0, 1023, 0.5, 0.034)}


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_medians_and_ratios_within_a_repetition():
    dense, w8a8, sparse, *others = Measured(SIDES, RUNS).points()
    assert (dense.figures["output_throughput"], sparse.figures["output_throughput"]) == (110, 150)
    assert sparse.ratio == pytest.approx((1.3, 1.2, 1.4))  # 1.3, 1.2, 1.4 in order
    assert dense.ratio is None and (w8a8.runs, w8a8.figures, w8a8.ratio) == (0, None, None)
    assert dense.figures["memory_bytes"] == 5e9 and sparse.runs == 3
    assert [point.users for point in others] == [4] * 3 and not any(point.ratio for point in others)  # no pair


def test_the_table():
    titles, _, *rows = cells(table(Measured(SIDES, RUNS, QUALITY)))
    assert titles[:5] == ["users", "side", "runs", "/ dense", "output tok/s"] and titles[-2:] == ["perplexity", "KL"]
    assert [row[:5] for row in rows[:3]] == [
        ["1", "dense", "3", "-", "110"],
        ["1", "w8a8", "0", "-", "-"],
        ["1", "sparse", "3", "1.300 (1.200 to 1.400)", "150"],
    ]
    assert [row[-2:] for row in rows[:3]] == [["40", "0"], ["-", "-"], ["60", "0.5"]]
    assert all(len(row) == len(titles) for row in rows) and len(rows) == 6
    assert rows[0][-4:-2] == ["5 GB", "2 GB"] and rows[1][-4:-2] == ["-", "-"]
    assert rows[2][-3] == "1.2 GB, 8:16 W8A8"


def test_files(tmp_path):
    write(tmp_path, Measured(SIDES, RUNS, QUALITY), {"input_len": 32, "data": None, "output": tmp_path})
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [Run(**one) for one in content["runs"]] == RUNS and content["sides"][2]["bytes"] == 1_200_000_000
    assert content["points"][2]["ratio"] == pytest.approx([1.3, 1.2, 1.4]) and content["cores"] >= 1
    assert content["quality"]["sparse"]["kl"] == 0.5 and content["input_len"] == 32
    text = (tmp_path / "bench.md").read_text()
    assert "- sparse: `a/b`" in text and "input_len: 32" in text and "data:" not in text
    assert "1023 tokens" in text and "3.40%" in text and "Perplexity" not in summary(Measured(SIDES, RUNS))

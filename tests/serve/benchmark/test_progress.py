"""What a benchmark says while it waits. vLLM's command line is replaced, the processes are real."""

import re
import sys
import time
from pathlib import Path

import pytest
from server_stand_in import StandIn, serving

from ria_vllm import progress
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark import load, server
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.load import Workload, answered
from ria_vllm.serve.benchmark.quality import TextQuality
from ria_vllm.serve.benchmark.results import Side
from ria_vllm.serve.benchmark.server import running_server

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Lines and looks at the log come fast, so that little waiting shows all of them."""
    for module in (server, load):
        monkeypatch.setattr(module, "VLLM", [sys.executable, str(STAND_IN)])
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for module in (progress, load):
        monkeypatch.setattr(module, "POLL", 0.02)


def without_times(text: str) -> list[str]:
    """The lines of progress, each once, without their times."""
    lines = [re.sub(r" ?\([^()]*\)", "", line[4:]) for line in text.splitlines() if line.startswith("... ")]
    return list(dict.fromkeys(lines))


def test_a_server_that_hangs_while_it_starts(tmp_path, monkeypatch, capsys):
    """Its health check does not return meanwhile."""
    monkeypatch.setenv("STAND_IN_SECONDS", "0.5")
    monitor = Monitor()
    with monitor.live(), running_server("M", tmp_path / "log", monitor=monitor):
        shown = capsys.readouterr().err.splitlines()
    assert len(shown) > 5 and set(without_times("\n".join(shown))) == {"waiting for the server to start"}


def test_loads_count_the_requests_that_are_answered(tmp_path, monkeypatch, capsys):
    """Those of the warm-up do not count."""
    monkeypatch.setenv("STAND_IN_SECONDS", "0.3")
    sides = (Side("dense", "D", 2), Side("sparse", "S", 1))
    Comparison(sides, Workload(8, 8, 2), [2], 1, seed=0, folder=tmp_path, tokenizer="S").measure()
    found = capsys.readouterr()
    for side in ("dense", "sparse"):
        before, name = f"repetition 1/1, {side}", "requests of 2 users answered"
        assert f"{before}, waiting for the server to start" in without_times(found.err)
        counts = [line for line in without_times(found.err) if line.startswith(f"{before}, {name}")]
        # tqdm shows a request that is answered less than a second after the last one with a later one.
        assert counts[0].endswith(" 0/4") and len(counts) > 1
        assert all(re.fullmatch(rf"{before}, {name} [0-4]/4", line) for line in counts)
        assert f"{before}, 2 users: 20 output tokens/s" in found.out
    assert "..." not in found.out


def test_offline_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_SECONDS", "0.3")
    Comparison((Side("dense", "D", 2),), Workload(8, 8, 2), [], 1, seed=0, folder=tmp_path, tokenizer="S").measure()
    expected = "repetition 1/1, dense, offline, waiting for vllm bench throughput"
    assert expected in without_times(capsys.readouterr().err)


def test_texts_count_their_windows(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("a text of one-byte characters" * 8)
    quality = TextQuality(tmp_path / "text", 32, 10_000, 8, "dense")
    monitor, stand_in = Monitor(), StandIn()
    stand_in.answer = lambda path, answer: (time.sleep(0.05), (200, answer))[1]
    with serving(stand_in) as served, monitor.live():
        quality.check("dense", served)
        quality.measure("dense", served, monitor)
    assert [f"windows of text {n}/7" for n in range(7)] == without_times(capsys.readouterr().err)


def test_requests_that_are_answered(tmp_path):
    """As vllm bench serve of vLLM 0.32 writes it to a file."""
    log = tmp_path / "log"
    log.write_text(
        "$ vllm\nStarting initial single prompt test run...\nWarming up with 8 requests...\n"
        "\r  0%|          | 0/8 [00:00<?, ?it/s]\r100%|##########| 8/8 [00:05<00:00,  1.60it/s]\n"
    )
    assert answered(log) == 0
    with open(log, "a") as file:
        file.write("Starting main benchmark run...\nMaximum request concurrency: 8\n\r  0%|          | 0/16 [00:00<?")
        file.flush()
        assert answered(log) == 0
        file.write(", ?it/s]\r  6%|6         | 1/16 [00:04<01:00,  4.0s/it]\r 50%|#####     | 8/16 [00:05<00:0")
        file.flush()
        assert answered(log) == 8

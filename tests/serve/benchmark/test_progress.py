"""What a benchmark says while it waits. vLLM's command line is replaced, the processes are real."""

import re
import sys
import time
from pathlib import Path

import pytest
from server_stand_in import StandIn, serving

from ria_vllm import progress
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark import server
from ria_vllm.serve.benchmark.quality import TextQuality
from ria_vllm.serve.benchmark.server import running_server

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Lines come fast, so that little waiting shows all of them."""
    monkeypatch.setattr(server, "VLLM", [sys.executable, str(STAND_IN)])
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "POLL", 0.02)


def without_times(text: str) -> list[str]:
    """The lines of progress, each once, without their times."""
    lines = [re.sub(r" ?\([^()]*\)", "", line[4:]) for line in text.splitlines() if line.startswith("... ")]
    return list(dict.fromkeys(lines))


def test_a_server_that_hangs_while_it_starts(tmp_path, monkeypatch, capsys):
    """Its health check does not return meanwhile."""
    monkeypatch.setenv("STAND_IN_SECONDS", "0.5")
    monitor = Monitor()
    with monitor.live(), running_server("M", tmp_path / "log", [], monitor):
        shown = capsys.readouterr().err.splitlines()
    assert len(shown) > 5 and set(without_times("\n".join(shown))) == {"waiting for the server to start"}


def test_texts_count_their_windows(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("a text of one-byte characters" * 8)
    quality = TextQuality(tmp_path / "text", 32, 10_000)
    monitor, stand_in = Monitor(), StandIn()
    stand_in.answer = lambda path, answer: (time.sleep(0.05), (200, answer))[1]
    with serving(stand_in) as served, monitor.live():
        quality.check("dense", served)
        quality.measure("dense", served, monitor)
    assert [f"windows of text {n}/7" for n in range(7)] == without_times(capsys.readouterr().err)

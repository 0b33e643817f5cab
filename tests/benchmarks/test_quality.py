"""`python -m benchmarks.quality`: its table, and what a second run measures again."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import quality
from benchmarks.quality import main
from ria_vllm.offline.evaluation.evaluate import perplexity, read_tokens
from ria_vllm.offline.model.run.hf import load_model


def run(tiny, text, tmp_path, *ways):
    arguments = [str(tiny("llama")), *ways, "--data", str(text), "--text", str(text), "--samples", "4"]
    arguments += ["--seq-len", "32", "--windows", "1", "--results", str(tmp_path / "found.json")]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_way_has_a_row_and_finished_rows_are_kept(tiny, text, tmp_path, monkeypatch):
    ways = ("method=magnitude permute=none reconstruct=none", "reconstruct=admm")
    first = run(tiny, text, tmp_path, *ways)
    assert [line for line in first.splitlines() if "`" in line][0].startswith(f"| `{ways[0]}` | ")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 2
    dense = perplexity(load_model(str(tiny("llama")), "cpu"), read_tokens(str(tiny("llama")), text, 1024), 1024)
    magnitude, default = (row["perplexity"] for row in found.values())
    assert dense.perplexity < default < magnitude
    monkeypatch.setattr(quality, "measure", lambda *_: pytest.fail("measured again"))
    assert run(tiny, text, tmp_path, *ways) == first

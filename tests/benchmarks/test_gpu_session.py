"""gpu_session rehearsed on the CPU, with a mocked Hopper and a stand-in for compute-sanitizer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_gpu import use_library

from benchmarks import gpu_bundle, gpu_check, gpu_session
from benchmarks.gpu_check import Part
from benchmarks.gpu_record import Record
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES
from ria_vllm.serve.kernels.cuda.bindings import LIBRARY_FOLDER_VARIABLE

ROOT = Path(__file__).parents[2]
HOPPER = ARCHITECTURES["90a"]


@pytest.fixture
def ready(small, monkeypatch, tmp_path):
    """A mocked Hopper with a bundle."""
    monkeypatch.setattr(gpu_bundle, "reason_against", lambda folder, target: None)
    monkeypatch.setenv(LIBRARY_FOLDER_VARIABLE, str(tmp_path / "bundle"))
    return small


def session(step, *arguments):
    return gpu_session.main([step, "--out", "out", *arguments])


@pytest.fixture
def parts(ready, monkeypatch):
    """Three parts of two rows each; returns how often each was started, and `broken`, which replaces rows."""
    started, broken = [], {}

    def rows(name):
        started.append(name)
        for number in range(2):
            yield {"at": f"row {number}"}
            yield broken.get((name, number), lambda: {"number": number, "ok": True})()

    names = ("first", "second", "third")
    monkeypatch.setattr(
        gpu_check, "parts_of", lambda options: [Part(name, "checks", lambda name=name: rows(name)) for name in names]
    )
    return started, broken


def killed():
    raise KeyboardInterrupt


def test_an_interrupted_step_is_continued(parts):
    started, broken = parts
    broken["second", 1] = killed
    with pytest.raises(KeyboardInterrupt):
        session("check")
    with Path("out/check.jsonl").open("a") as file:
        file.write('{"part": "second", "sec')  # the process was killed while it wrote
    record = Record(Path("out/check.jsonl"))
    assert record.outcomes == {"first": "passed", "second": "cut"}
    assert [row["number"] for row in record.rows()] == [0, 1, 0]

    broken.clear(), started.clear()
    assert session("check") == 0
    assert started == ["second", "third"]
    record = Record(Path("out/check.jsonl"))
    assert set(record.outcomes.values()) == {"passed"} and [row["number"] for row in record.rows()] == [0, 1] * 3


def test_an_ampere_tries_int8_first_too(ampere_layers, monkeypatch):
    use_library(monkeypatch, ampere_layers)
    parts = gpu_session.first_products()
    assert [part.name for part in parts] == ["first product torch.bfloat16", "first product torch.int8"]
    used = []
    for part in parts:
        assert [row["ok"] for row in part.rows() if "at" not in row] == [True]
        used.append(ampere_layers.used)
    assert used == ["128x32", "int8_128x32"]


@pytest.mark.slow
def test_a_session_in_a_bare_folder(tmp_path, sanitizer):
    """All steps as on a GPU machine: worker processes, a bundle, a checkout, and of our dependencies torch alone."""
    for folder in gpu_bundle.PACKAGES:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("serve/pretend_hopper.py", "benchmarks/small_gpu.py", "benchmarks/rehearsal.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    bundle = tmp_path / ".work" / "gpu"
    bundle.mkdir(parents=True)
    (bundle / HOPPER.library).touch()
    gpu_bundle.write_manifest(bundle, HOPPER, "13.0")
    sanitizer(
        """\
        done = subprocess.run([sys.argv[-4], "rehearsal.py", *sys.argv[-2:]])
        print("========= ERROR SUMMARY: 0 errors", file=log)
        sys.exit(done.returncode)"""
    )
    environment = {name: value for name, value in os.environ.items() if name != LIBRARY_FOLDER_VARIABLE}
    for step in ("needs", "check", "fill", "times", "decode", "sanitize", "report"):
        place = () if step == "needs" else ("--out", "out")
        command = [sys.executable, "rehearsal.py", "benchmarks.gpu_session", step, *place]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, (step, done.stdout[-3000:], done.stderr[-3000:], _log(tmp_path))
        if step == "needs":
            assert (
                "here:    all is there" in done.stdout and "gpu.tgz benchmarks ria_vllm serve .work/gpu;" in done.stdout
            )
    found = json.loads((tmp_path / "out" / "session.json").read_text())
    for step in ("check", "times", "decode", "sanitize"):
        assert set(found[step]["outcomes"].values()) == {"passed"}
    assert {row["checks"] > 0 for row in found["sanitize"]["rows"]} == {True}
    assert {row["tokens"] for row in found["decode"]["rows"] if "us" in row} == {1, 3}
    assert "(90, 132, 16, 192, 64): (" in (tmp_path / "serve" / "kernels" / "cuda" / "tiles.py").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8


def _log(folder):
    log = folder / "out" / "sanitizer.log"
    return log.read_text()[-3000:] if log.exists() else ""

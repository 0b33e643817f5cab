"""gpu_session rehearsed on the CPU, with a mocked Hopper and a stand-in for compute-sanitizer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretend_hopper import TILES, PretendLibrary
from sanitizer_stand_in import NO_ERRORS

from benchmarks import gpu_bundle, gpu_check, gpu_sanitizer, gpu_session
from benchmarks.gpu_check import Part
from benchmarks.gpu_record import Record
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
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


def outcomes(step):
    return Record(Path("out") / f"{step}.jsonl").outcomes


def test_check_report_and_fill(ready, monkeypatch, capsys):
    monkeypatch.setattr(gpu_session, "TILES", Path("tiles.py"))
    shutil.copy(ROOT / "serve" / "kernels" / "cuda" / "tiles.py", "tiles.py")
    assert session("check") == 0
    record = Record(Path("out/check.jsonl"))
    names = [part.name for part in gpu_check.parts_of(gpu_check.Options())]
    assert record.outcomes == dict.fromkeys(names, "passed") and len(names) == len(set(names))
    assert {row["tile"] for row in record.rows("tiles")} == set(TILES)
    checked = {row["check"] for row in record.rows("checks") if "check" in row}
    assert {f"tile {row['tile']} split_k {row['split']}" for row in record.rows("tiles")} <= checked
    assert [row["products"] for row in record.rows("concurrent")] == [8, 8]
    assert json.loads(Path("out/gpu_check.json").read_text())["tiles"] == record.rows("tiles")

    capsys.readouterr()
    assert session("report") == 0 and session("fill") == 0
    said = capsys.readouterr().out
    for text in (
        "cutlass against torch's dense bf16, up to 64 tokens (at most 1.78x): 1.5x wanted",
        "two streams at once",
        "with the times that `check` found",
    ):
        assert text in said
    assert json.loads(Path("out/session.json").read_text())["check"]["outcomes"] == record.outcomes

    filled = {}
    exec(Path("tiles.py").read_text(), filled)
    for tokens in {row["tokens"] for row in record.rows("tiles")}:
        times = {
            (r["tile"], r["split"]): r["us"]
            for r in record.rows("tiles")
            if r["tokens"] == tokens and r["value_bits"] == 16
        }
        ((name, split),) = filled["preferred_tiles"](90, 132, 16, 192, 64, tokens)
        assert times[name, split] == min(times.values())

    assert session("times") == 0 and session("report") == 0
    assert "with the times that `times` found" in capsys.readouterr().out
    found = Record(Path("out/times.jsonl"))
    assert found.rows("times") and {section for section, _ in found.rows_by_section()} == {"limits", "times"}
    assert json.loads(Path("out/session.json").read_text())["times_of"] == "times"

    # All has passed, so nothing runs again.
    before = Path("out/check.jsonl").read_text()
    monkeypatch.setattr(gpu_session, "first_products", list)
    monkeypatch.setattr(gpu_check, "run_parts", lambda *_: pytest.fail("ran again") if _[0] else iter(()))
    assert session("check") == 0 and Path("out/check.jsonl").read_text() == before


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


def test_a_failed_part_is_run_again(parts, capsys):
    started, broken = parts
    broken["first", 0] = lambda: {"ok": False, "why": "wrong"}
    assert session("check") == 1
    assert outcomes("check") == {"first": "failed", "second": "passed", "third": "passed"}
    session("report")
    assert "wrong" in capsys.readouterr().out
    broken.clear(), started.clear()
    assert session("check") == 0 and started == ["first"]


def test_a_later_machine_continues_with_what_an_earlier_one_found(parts):
    started, broken = parts
    broken["third", 0] = killed
    with pytest.raises(KeyboardInterrupt):
        session("check")
    broken.clear(), started.clear()
    assert gpu_session.main(["check", "--out", "elsewhere", "--earlier", "out"]) == 0
    assert started == ["third"] and len(Record(Path("elsewhere/check.jsonl")).rows()) == 6


def test_a_number_that_json_does_not_have_fails_its_part_alone(parts):
    _, broken = parts
    broken["second", 1] = lambda: {"excess": float("nan"), "ok": True}
    assert session("check") == 1
    assert outcomes("check") == {"first": "passed", "second": "failed", "third": "passed"}
    (row,) = [row for row in Record(Path("out/check.jsonl")).rows() if not row["ok"]]
    assert "nan" in row["row"] and row["error"] == "a number that JSON does not have"
    assert json.loads(Path("out/gpu_check.json").read_text())["checks"][3] == row


def test_without_a_library_no_time_is_spent(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(LIBRARY_FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(gpu_check, "parts_of", lambda options: pytest.fail("started"))
    assert session("check") == 1
    assert "there is no _cuda_sm90a.so" in capsys.readouterr().out
    (tmp_path / HOPPER.library).touch()
    (tmp_path / "manifest.json").write_text('{"sources": "of another commit"}')
    assert session("check") == 1
    assert "was not packed from the sources of this checkout" in capsys.readouterr().out
    gpu_bundle.write_manifest(tmp_path, HOPPER, "13.0")
    monkeypatch.setattr(CutlassKernel, "is_supported", staticmethod(lambda device: "it does not load"))
    assert session("check") == 1
    assert "it does not load" in capsys.readouterr().out
    (tmp_path / HOPPER.library).write_bytes(b"half of it")
    assert session("check") == 1
    assert f"{HOPPER.library} in {tmp_path} is not as it was packed: copy" in capsys.readouterr().out


def test_a_product_that_fails_ends_a_step_before_it_starts(parts, monkeypatch, capsys):
    started, _ = parts
    right = PretendLibrary.linear

    def put(linear):
        monkeypatch.setattr(PretendLibrary, "linear", linear)
        assert session("check") == 1 and started == []
        return capsys.readouterr().out

    def wrong(self, tile, split_k, x, values, metadata, bias, y, *rest):
        right(self, tile, split_k, x, values, metadata, bias, y, *rest)
        y += x.itemsize == 1

    assert "first product torch.float8_e4m3fn: wrong" in put(wrong)
    monkeypatch.setattr(gpu_session, "_FIRST_SECONDS", -1)
    assert "first product torch.bfloat16: out of time" in put(right)
    monkeypatch.setattr(gpu_check, "supervise", lambda *_: iter([(0, {"error": "the driver is too old", "ok": False})]))
    assert "first product torch.bfloat16: the driver is too old" in put(right)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(in_tmp, capsys):
    assert session("decode") == 1 and "torch sees no CUDA GPU" in capsys.readouterr().out


def test_the_sanitizer_step_is_cut_short_and_continued(ready, sanitizer):
    """The deadline passes while a tool runs: the tool is killed, and its group is the first to run later."""
    slow = "time.sleep(0.3)\n" + 'say(at="a step"); say(ok=True); time.sleep(0.1)\n' * 50
    found = 'print("========= Invalid read", file=log, flush=True); print("a warning", file=sys.stderr, flush=True)'
    sanitizer(f'open("pid", "w").write(str(os.getpid()))\n{found}\n{slow}' + NO_ERRORS)
    assert session("sanitize", "--seconds", "3") == gpu_session.UNFINISHED
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    assert outcomes("sanitize")["memcheck bfloat16"] == "cut"
    log = Path("out/sanitizer.log").read_text()
    for text in ("memcheck, bfloat16, cut short:\n", "Invalid read", "a warning"):
        assert text in log
    sanitizer(NO_ERRORS)
    assert session("sanitize") == 0
    expected = {f"{tool} {group}" for tool in gpu_sanitizer.TOOLS for group in gpu_sanitizer.GROUPS}
    assert outcomes("sanitize") == dict.fromkeys(expected, "passed")
    sanitizer("sys.exit(1)")
    assert session("sanitize") == 0


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

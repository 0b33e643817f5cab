"""The kernels' checks under a stand-in for compute-sanitizer: its verdicts, crashes and hangs."""

import time
from pathlib import Path

import pytest

from benchmarks import gpu_sanitizer


def under(tool="memcheck", group="bfloat16"):
    rows = list(gpu_sanitizer.run_under(tool, group, Path("bundle"), Path("sanitizer.log")))
    return [row for row in rows if "at" not in row]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (
            'say(ok=True)\nprint("========= Invalid __global__ read of size 16", file=log)\n'
            'print("========= ERROR SUMMARY: 3 errors", file=log)\nsys.exit(86)',
            "Invalid __global__ read",
        ),
        (
            'say(ok=True)\nprint("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", file=log)',
            "1 hazard",
        ),
        (
            'say(ok=True)\nprint("========= Error: Device not supported", file=log)\nsys.exit(255)',
            "Device not supported",
        ),
        ('print("========= ERROR SUMMARY: 0 errors", file=log)\nsys.exit(1)', "0 errors"),
        ("say(ok=True)\nos.kill(os.getpid(), 9)", "no report"),
        ("log.truncate(0); log = None; sys.exit('unrecognised option')", "no report\nunrecognised option"),
        ('say(at="a hanging product")\ntime.sleep(60)', "no line from the checks for 1 s, at a hanging product"),
    ],
    ids=["errors", "hazards", "unsupported", "checks crash", "tool crashes", "usage", "hang"],
)
def test_errors(in_tmp, sanitizer, monkeypatch, body, error):
    monkeypatch.setattr(gpu_sanitizer, "SILENCE", 1 if "sleep" in body else 60)
    sanitizer(body)
    start = time.monotonic()
    (verdict,) = under()
    assert not verdict["ok"] and error in verdict["error"] and time.monotonic() - start < 20
    assert "memcheck, bfloat16:" in Path("sanitizer.log").read_text()


def test_no_checks_are_no_success(in_tmp, sanitizer):
    sanitizer('print("========= ERROR SUMMARY: 0 errors", file=log)')
    assert [row["ok"] for row in under()] == [False]

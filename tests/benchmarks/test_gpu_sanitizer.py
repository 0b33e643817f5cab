"""The kernels' checks under a stand-in for compute-sanitizer: its verdicts, crashes and hangs."""

import json
import time
import zipfile
from pathlib import Path

import pytest
from pretend_hopper import TILES
from sanitizer_stand_in import NO_ERRORS

from benchmarks import gpu_sanitizer
from ria_vllm.errors import RiaError


def under(tool="memcheck", group="bfloat16"):
    rows = list(gpu_sanitizer.run_under(tool, group, Path("bundle"), Path("sanitizer.log")))
    return [row for row in rows if "at" not in row]


def test_no_errors(in_tmp, sanitizer):
    sanitizer(NO_ERRORS)
    assert under() == [
        {"tool": "memcheck", "group": "bfloat16", "checks": 1, "errors": 0, "exit_status": 0, "ok": True}
    ]


@pytest.mark.parametrize("tool", gpu_sanitizer.TOOLS)
def test_what_the_tool_is_started_with(in_tmp, sanitizer, tool):
    sanitizer(
        'open("started", "w").write(json.dumps([sys.argv, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]))\n'
        + NO_ERRORS
    )
    for group, caching in (("bfloat16", "1"), (gpu_sanitizer.GRAPHS, None)):
        under(tool, group)
        command, variable = json.loads(Path("started").read_text())
        assert command[1:3] == ["--tool", tool] and command[-3:] == ["-m", "benchmarks.gpu_sanitizer", group]
        assert variable == caching  # a CUDA graph needs torch's pool; all else must not use it
        assert command[command.index("--launch-timeout") + 1] == "0"
        assert ("--check-tensor-ops" in command) == (tool == "memcheck")
        assert ("--initcheck-track-filtered-global-memory" in command) == (tool == "initcheck")
        assert ("kernel_substring=device_kernel" in command) == (tool != "memcheck")


@pytest.mark.parametrize(
    ("probe", "error"),
    [
        ("print('Error: Device not supported. ERROR SUMMARY: 1 error', file=log)", "Device not supported"),
        ("print('no such option', file=sys.stderr)", "COMPUTE-SANITIZER\nno such option"),
        ("time.sleep(60)", "nothing after 1 s"),
    ],
    ids=["unsupported", "no summary", "hang"],
)
def test_a_machine_on_which_the_tool_does_not_run(in_tmp, sanitizer, monkeypatch, probe, error):
    monkeypatch.setattr(gpu_sanitizer, "_PROBE_SECONDS", 1 if "sleep" in probe else 60)
    sanitizer(NO_ERRORS, probe=probe)
    with pytest.raises(RiaError, match="(?s)does not run on this machine.*" + error):
        gpu_sanitizer.check_machine(Path("bundle"))
    monkeypatch.setattr(gpu_sanitizer, "_PROBE_SECONDS", 60)
    sanitizer("sys.exit(1)")
    gpu_sanitizer.check_machine(Path("bundle"))


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


def test_checks_that_fail_without_an_error_of_the_tool(in_tmp, sanitizer):
    sanitizer('say(ok=False, check="float64")\nprint("========= ERROR SUMMARY: 0 errors", file=log)')
    failed, verdict = under()
    assert failed["check"] == "float64" and not failed["ok"] and verdict["errors"] == 0


def test_no_checks_are_no_success(in_tmp, sanitizer):
    sanitizer('print("========= ERROR SUMMARY: 0 errors", file=log)')
    assert [row["ok"] for row in under()] == [False]


def test_a_machine_without_compute_sanitizer(in_tmp, sanitizer, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_sanitizer, "_USUAL_PLACES", ())
    (verdict,) = under()
    assert not verdict["ok"] and "no compute-sanitizer" in verdict["error"]
    inside = Path("package/nvidia/cu13/compute-sanitizer/compute-sanitizer").absolute()
    sanitizer(NO_ERRORS, inside)
    monkeypatch.setenv("PATH", "")
    Path("bundle").mkdir()
    with zipfile.ZipFile("bundle/nvidia_cuda_sanitizer_api-13.0-py3-none-any.whl", "w") as wheel:
        wheel.write(inside, inside.relative_to(Path("package").absolute()))
    assert [row["ok"] for row in under()] == [True]


def test_every_quick_check_of_our_kernels_is_in_one_group(small):
    names = [part.name for group in gpu_sanitizer.GROUPS for part in gpu_sanitizer.checks_of(group)]
    assert len(names) == len(set(names))
    for text in ("cutlass torch.bfloat16", "cutlass torch.float16", "fp8 weights", "CUDA graph", "two streams", *TILES):
        assert any(text in name for name in names)
    assert not any("cusparselt" in name or "reference" in name or "concurrent" in name for name in names)

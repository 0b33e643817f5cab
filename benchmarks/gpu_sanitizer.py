"""Our CUDA kernels under compute-sanitizer. Part of gpu_session.

`python -m benchmarks.gpu_sanitizer GROUP` is what runs under it: one group of the quick checks of gpu_check, whose rows
it prints as lines of JSON. The products have few tokens, because compute-sanitizer slows kernels down a lot.
"""

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import IO

import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Options, Part
from benchmarks.gpu_timing import Row
from ria_vllm.errors import RiaError

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOKENS = (1, 33, 333)
GRAPHS = "graphs and streams"
GROUPS = ("bfloat16", "fp8", GRAPHS, "float16")
SILENCE = 180  # seconds without a line from the checks after which they count as hung
SANITIZER_PACKAGE = "nvidia-cuda-sanitizer-api"
_FOUND_ERRORS = 86  # exit status
_USUAL_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")

# Only our kernels, where the tool looks at each kernel by itself. memcheck is fast enough for all. initcheck must see
# what torch's kernels write, and so checks them too unless it can track them without.
_OURS = ("device_kernel", "pack_metadata", "sparse_linear")
_ONLY_OURS = [argument for name in _OURS for argument in ("--kernel-name", f"kernel_substring={name}")]
_CHECK_TENSORS = ["--check-tensor-ops", "yes"]  # TMA's accesses
_TRACK_OTHERS = ["--initcheck-track-filtered-global-memory", "yes"]
_PROBE = "import torch; torch.zeros(1, device='cuda')"
_PROBE_SECONDS = 90


def group_of(part: Part) -> str:
    """The group that a part of gpu_check is run in."""
    if part.name.startswith(("CUDA graph", "two streams")):
        return GRAPHS
    return "fp8" if "fp8" in part.name else "float16" if "float16" in part.name.replace("bfloat16", "") else "bfloat16"


def checks_of(group: str) -> list[Part]:
    parts = gpu_check.parts_of(Options(quick=True, only_ours=True, tokens=TOKENS))
    return [part for part in parts if group_of(part) == group]


def find_sanitizer(bundle: Path) -> Path:
    """compute-sanitizer: the one on the PATH, that of a CUDA toolkit, or the wheel in `bundle`, which is unpacked.

    Raises:
        RiaError: there is none.
    """
    for place in (None, *_USUAL_PLACES):
        if found := shutil.which("compute-sanitizer", path=place):
            return Path(found)
    for wheel in bundle.glob(f"{SANITIZER_PACKAGE.replace('-', '_')}-*.whl"):
        return _unpacked(wheel)
    raise RiaError(f"no compute-sanitizer: not on the PATH, in no CUDA toolkit, and no wheel of it in {bundle}")


@cache
def _unpacked(wheel: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="compute-sanitizer-"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    found = next(folder.rglob("compute-sanitizer/compute-sanitizer"))
    for file in found.parent.iterdir():
        file.chmod(0o755)
    return found


@cache
def _usage(sanitizer: Path) -> str:
    return subprocess.run([str(sanitizer), "--help"], capture_output=True, text=True).stdout


def _arguments(tool: str, sanitizer: Path) -> list[str]:
    """The tool's options, as far as this version has them."""
    usage = _usage(sanitizer)
    if tool == "memcheck":
        quiet = ["--report-api-errors", "no"]  # torch makes calls that fail and handles their errors
        return quiet + (_CHECK_TENSORS if _CHECK_TENSORS[0] in usage else [])
    if tool == "initcheck":
        return _ONLY_OURS + _TRACK_OTHERS if _TRACK_OTHERS[0] in usage else []
    return _ONLY_OURS


def _command(sanitizer: Path, tool: str, report: Path) -> list[str]:
    # Without a timeout of its own for the launch: importing torch may take longer than its ten seconds.
    return [str(sanitizer), "--tool", tool, "--launch-timeout", "0", "--log-file", str(report)]


def check_machine(bundle: Path) -> None:
    """Run memcheck over one operation of torch, before time is spent on anything longer.

    Raises:
        RiaError: there is no compute-sanitizer, or it does not run on this machine.
    """
    sanitizer = find_sanitizer(bundle)
    with tempfile.TemporaryDirectory() as scratch:
        report, errors = Path(scratch) / "report", Path(scratch) / "errors"
        command = [*_command(sanitizer, "memcheck", report), sys.executable, "-c", _PROBE]
        hung = False
        with errors.open("w") as stderr, _process(command, dict(os.environ), stderr) as process:
            try:
                process.wait(_PROBE_SECONDS)
            except subprocess.TimeoutExpired:
                hung = True
        text, said = report.read_text() if report.exists() else "", errors.read_text()
    if hung:
        raise RiaError(f"compute-sanitizer does not run on this machine: nothing after {_PROBE_SECONDS} s")
    if "not supported" in text.lower() or summary_of(text) is None:
        lines = [*text.splitlines()[:10], *said.splitlines()[-5:]] or ["no report"]
        raise RiaError("compute-sanitizer does not run on this machine: " + "\n".join(lines))


def parts(bundle: Path, log: Path) -> list[Part]:
    """A part for each tool and group, the most important first.

    Args:
        bundle: folder that may have a wheel of compute-sanitizer.
        log: the tools' reports are appended to it.
    """
    in_order = [(tool, group) for tool in TOOLS for group in GROUPS[:-1]] + [(tool, GROUPS[-1]) for tool in TOOLS]
    return [
        Part(f"{tool} {group}", "sanitizer", partial(run_under, tool, group, bundle, log)) for tool, group in in_order
    ]


def run_under(tool: str, group: str, bundle: Path, log: Path) -> Iterator[Row]:
    """The rows of the group's checks that failed, and one with the tool's verdict on all of them."""
    verdict: Row = {"tool": tool, "group": group}
    try:
        sanitizer = find_sanitizer(bundle)
    except RiaError as error:
        yield {**verdict, "ok": False, "error": str(error)}
        return
    with tempfile.TemporaryDirectory() as scratch:
        report, errors = Path(scratch) / "report", Path(scratch) / "errors"
        command = [*_command(sanitizer, tool, report), "--error-exitcode", str(_FOUND_ERRORS), "--print-limit", "20"]
        command += [*_arguments(tool, sanitizer), sys.executable, "-m", "benchmarks.gpu_sanitizer", group]
        environment = dict(os.environ)
        if group != GRAPHS:
            # Each tensor gets an allocation of its own. In torch's pool, an access past its end would go unnoticed.
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        at, checks, hung, ended = "the start", 0, False, ", cut short"
        try:
            with errors.open("w") as stderr, _process(command, environment, stderr) as process:
                for row in _lines(process):
                    if row is None:
                        hung = True
                        break
                    checks += "ok" in row
                    at = row.get("at", at)
                    if "at" in row or "waiting" in row:
                        yield {"at": at}
                    elif row.get("ok") is False:
                        yield {**verdict, **row}
                if not hung:
                    process.wait()
                ended = ""
        finally:  # the deadline closes this generator at a `yield`
            text, said = report.read_text() if report.exists() else "", errors.read_text()
            with log.open("a") as file:
                print(f"{tool}, {group}{ended}:\n{text}{said}", file=file)
    found = summary_of(text)
    verdict |= {"checks": checks, "errors": found, "exit_status": process.returncode}
    if hung:
        verdict["error"] = f"no line from the checks for {SILENCE} s, at {at}"
    elif found or process.returncode or found is None:
        lines = text.splitlines()[:30] or ["no report", *said.splitlines()[-5:]]
        verdict["error"] = "\n".join(lines)
    yield {**verdict, "ok": "error" not in verdict and checks > 0}


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], stderr: IO[str]) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, which is killed if it is still running at the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _lines(process: subprocess.Popen) -> Iterator[Row | None]:
    """The objects that the process prints, one a line; {"waiting"} every two seconds while it is silent, so that the
    caller notices a deadline; None as the last if it was silent for SILENCE seconds.
    """
    buffer, heard = b"", time.monotonic()
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < heard + SILENCE:
            if not selector.select(timeout=2):
                yield {"waiting": True}
                continue
            data = os.read(process.stdout.fileno(), 2**16)
            if not data:
                return
            heard = time.monotonic()
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):
                    yield json.loads(line)
    yield None


def summary_of(report: str) -> int | None:
    """The number of errors (for racecheck, hazards) in the report's summary; None if it has none."""
    for line in reversed(report.splitlines()):
        if "SUMMARY:" in line:
            return next((int(word) for word in line.split("SUMMARY:")[1].split() if word.isdigit()), None)
    return None


def main() -> None:
    for _, row in gpu_check.run_parts(checks_of(sys.argv[1]), float("inf")):
        print(json.dumps(row, allow_nan=False), flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

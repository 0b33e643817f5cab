"""No process survives when the asking process is interrupted, crashes or is killed, not even a detached daemon."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from running import alive

from ria_vllm.serve.benchmark import supervisor
from ria_vllm.serve.benchmark.process import SupervisedProcess

# A server that is hard to end: it has a child in a session of its own, and both can ignore SIGTERM.
STUBBORN = """
import os, signal, subprocess, sys, time
pids, deaf = sys.argv[1], sys.argv[2] == "deaf"
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 3:
    subprocess.Popen([sys.executable, __file__, pids, sys.argv[2], "child"], start_new_session=True)
with open(pids, "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(600)
"""


@pytest.fixture
def stubborn(tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    return script


def pids_in(path, count: int = 2) -> list[int]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().split()) == count:
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError("the processes did not start")


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def command(script, tmp_path, deaf: bool = False) -> list[str]:
    return [sys.executable, str(script), str(tmp_path / "pids"), "deaf" if deaf else "polite"]


def test_stop_ends_the_whole_tree_and_returns_when_it_is_gone(stubborn, tmp_path):
    process = SupervisedProcess(command(stubborn, tmp_path), tmp_path / "log")
    pids = pids_in(tmp_path / "pids")
    assert process.running and all(alive(pid) for pid in pids)
    process.stop()
    assert not process.running and not any(alive(pid) for pid in pids)


def test_processes_that_ignore_sigterm_are_killed(stubborn, tmp_path, monkeypatch):
    # The grace period belongs to the supervisor's process, so a copy of its program gets a shorter one.
    short = tmp_path / "supervisor.py"
    with open(supervisor.__file__) as file:
        short.write_text(file.read().replace("GRACE_SECONDS = 15.0", "GRACE_SECONDS = 0.5"))
    monkeypatch.setattr(supervisor, "__file__", str(short))
    process = SupervisedProcess(command(stubborn, tmp_path, deaf=True), tmp_path / "log")
    pids = pids_in(tmp_path / "pids")
    process.stop()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_tree_ends_with_the_process_that_asked(stubborn, tmp_path, end):
    asking = textwrap.dedent(f"""
        import signal, sys, time
        from pathlib import Path
        from ria_vllm.serve.benchmark.process import SupervisedProcess
        # A shell's background job, which the tests may be, hands down an ignored SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with SupervisedProcess({command(stubborn, tmp_path)!r}, Path({str(tmp_path / "log")!r})):
            time.sleep(600)
    """)
    asker = subprocess.Popen([sys.executable, "-c", asking], stderr=subprocess.DEVNULL)
    pids = pids_in(tmp_path / "pids")
    os.kill(asker.pid, end)
    asker.wait(timeout=30)
    assert gone(pids, 30)


def test_what_a_command_leaves_behind_ends_with_it(stubborn, tmp_path):
    """The command itself crashes; the child it detached does not stay."""
    process = SupervisedProcess(command(stubborn, tmp_path), tmp_path / "log")
    pids = pids_in(tmp_path / "pids")
    child = next(pid for pid in pids if open(f"/proc/{pid}/cmdline").read().endswith("child\0"))
    os.kill(next(pid for pid in pids if pid != child), signal.SIGKILL)
    assert process.wait(30) == 128 + signal.SIGKILL
    assert not alive(child)

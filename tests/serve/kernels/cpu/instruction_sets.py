"""Programs that run with another instruction set than this process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3]


def run_with(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python with these arguments, where the kernel cpu takes the instruction set."""
    path = os.pathsep.join((str(SHARED), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "RIA_VLLM_CPU_ISA": instruction_set, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def said_by(sweep: str, instruction_set: str) -> list[str]:
    """The words that a sweep in this folder prints with the instruction set; skips the test if the machine lacks it."""
    done = run_with(instruction_set, str(Path(__file__).with_name(sweep)))
    if "this machine lacks these instructions" in done.stderr:
        pytest.skip(f"this machine has no {instruction_set}")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()

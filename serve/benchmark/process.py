"""A supervised command with its output in a log file, and the memory of its process tree."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from ria_vllm.serve.benchmark import supervisor


class SupervisedProcess:
    """Starts `command`. Every process that it started ends with the `with` block, or with this process.

    Args:
        log: file for the command, its standard output and its errors; its folder must exist.
        environment: variables to add to those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        self.log = log
        with open(log, "wb", buffering=0) as output:
            output.write(("$ " + " ".join(command) + "\n").encode())
            self._supervisor = subprocess.Popen(
                [sys.executable, supervisor.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # the terminal's Ctrl-C must reach this process only
            )

    def __enter__(self) -> "SupervisedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self.wait(0) is None

    def wait(self, timeout: float | None = None) -> int | None:
        """The command's exit status, 128 + the number of the signal that ended it, or None after `timeout` seconds."""
        try:
            return self._supervisor.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End all processes of the tree, and return when they are gone."""
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError):
            self._supervisor.stdin.close()
        self.wait()

    def memory(self) -> int:
        """Bytes of main memory that the tree holds: the sum of proportional set sizes (PSS), in which processes that
        share a page share its bytes."""
        return self._sum(lambda process: process.memory_full_info().pss)

    def own_memory(self) -> int:
        """Bytes that are neither pages of files nor shared. They show leaks better: they do not depend on which other
        processes have loaded the same libraries."""
        return self._sum(lambda process: process.memory_info().rss - process.memory_info().shared)

    def _sum(self, size: Callable[[psutil.Process], int]) -> int:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._supervisor.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended
                    total += size(process)
        return total

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_bytes()[-20_000:].decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def wait_until(ready: Callable[[], bool], process: SupervisedProcess, timeout: float = float("inf")) -> bool:
    """Call `ready` every half second until it is true; False if the process ends or `timeout` seconds pass."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.running:
        if ready():
            return True
        time.sleep(0.5)
    return False

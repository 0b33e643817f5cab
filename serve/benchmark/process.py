"""A supervised command with its output in a log file, and the memory of its process tree."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
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

    def stop(self) -> None:
        """End all processes of the tree, and return when they are gone."""
        assert self._supervisor.stdin is not None
        with suppress(OSError):
            self._supervisor.stdin.close()
        self._supervisor.wait()

    @property
    def running(self) -> bool:
        return self._supervisor.poll() is None

    def wait(self, timeout: float) -> int | None:
        """The command's exit status, 128 + the number of the signal that ended it, or None after `timeout` seconds."""
        try:
            return self._supervisor.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def processes(self) -> list[psutil.Process]:
        """Those of the tree."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._supervisor.pid).children(recursive=True)
        return []

    def memory(self) -> int:
        """Bytes of main memory that the tree holds: the sum of proportional set sizes (PSS), in which processes that
        share a page share its bytes."""
        total = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # it has ended
                try:
                    total += process.memory_full_info().pss
                except (psutil.AccessDenied, AttributeError):  # no smaps here
                    total += process.memory_info().rss
        return total

    def end_of_log(self) -> str:
        lines = self.log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
        return masked("\n".join([f"The end of {self.log}:", *lines[-15:]]))


def masked(text: str) -> str:
    """Without the servers' key: some of them quote what they got."""
    key = os.environ.get("VLLM_API_KEY")
    return text.replace(key, "***") if key else text

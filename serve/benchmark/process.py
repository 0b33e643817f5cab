"""A supervised command with its output in a log file, and the memory of its process tree."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from ria_vllm.serve.benchmark import supervisor
from ria_vllm.serve.benchmark.redaction import hidden, pass_on, secrets_of


class SupervisedProcess:
    """Starts `command`. Every process that it started ends with the `with` block, or with this process.

    Keys and tokens on the command line and in the environment do not get into the log.

    Args:
        log: file for standard output and error; its folder must exist.
        environment: variables to add to those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        self.log = log
        output = open(log, "wb", buffering=0)
        output.write(("$ " + " ".join(hidden(command)) + "\n").encode())
        environment = {**os.environ, **(environment or {})}
        self._supervisor = subprocess.Popen(
            [sys.executable, supervisor.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C must reach this process only
        )
        self._output = threading.Thread(target=self._log, args=(output, secrets_of(command, environment)), daemon=True)
        self._output.start()
        self._root = psutil.Process(self._supervisor.pid)

    def _log(self, output: IO[bytes], secrets: Sequence[str]) -> None:
        assert self._supervisor.stdout is not None
        with output, self._supervisor.stdout as source:
            pass_on(source, output, secrets)

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
            status = self._supervisor.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        self._output.join()  # the log is whole
        return status

    def stop(self) -> None:
        """End all processes of the tree, and return when they are gone."""
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError):
            self._supervisor.stdin.close()
        self.wait()

    def memory(self) -> int:
        """Bytes of main memory that the tree holds: the sum of proportional set sizes (PSS), in which processes that
        share a page share its bytes."""
        return sum(proportional_set_size(process.pid) for process in self._descendants())

    def own_memory(self) -> int:
        """The same without pages of files. It shows leaks better, because it does not depend on which other processes
        have loaded the same libraries."""
        return sum(proportional_set_size(process.pid, files=False) for process in self._descendants())

    def _descendants(self) -> list[psutil.Process]:
        try:
            return self._root.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_bytes()[-20_000:].decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def proportional_set_size(pid: int, files: bool = True) -> int:
    """Bytes; 0 for a process that has ended. The resident set size if the kernel does not report the proportional one.

    psutil does not split the proportional set size into anonymous and file pages.

    Args:
        files: whether to count pages of mapped files, such as libraries.
    """
    proportional = ("Pss:",) if files else ("Pss_Anon:", "Pss_Shmem:")
    resident = ("VmRSS:",) if files else ("RssAnon:", "RssShmem:")
    for file, fields in (("smaps_rollup", proportional), ("status", resident)):
        with contextlib.suppress(OSError):
            lines = map(str.split, Path(f"/proc/{pid}/{file}").read_text().splitlines())
            sizes = [int(line[1]) * 1024 for line in lines if line[0] in fields]
            if len(sizes) == len(fields):
                return sum(sizes)
    return 0


class PeakMemory:
    """Samples the memory of a process's tree in the background; `peak` is the largest value seen, in bytes.

    Args:
        interval: seconds between samples.
    """

    def __init__(self, process: SupervisedProcess, interval: float = 2.0):
        self.peak = 0
        self._process, self._interval = process, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self._process.memory())
            if self._done.wait(self._interval):
                return

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory())


def wait_until(ready: Callable[[], bool], process: SupervisedProcess, timeout: float, interval: float = 0.5) -> bool:
    """Call `ready` every `interval` seconds until it is true; False if the process ends or `timeout` seconds pass."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.running:
        if ready():
            return True
        time.sleep(interval)
    return False

"""A supervised command with its output in a log file, and the memory of its process tree."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ria_vllm.serve.benchmark import supervisor


class SupervisedProcess:
    """Starts `command`; leaving the `with` block, or the end of this process, ends every process it started.

    Args:
        log: gets standard output and error; its folder must exist.
        environment: variables beyond those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        self.log = log
        with open(log, "wb") as output:
            output.write(("$ " + " ".join(command) + "\n").encode())
            output.flush()
            self._supervisor = subprocess.Popen(
                [sys.executable, supervisor.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # the terminal's Ctrl-C must reach this process only
            )

    def __enter__(self) -> "SupervisedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._supervisor.poll() is None

    def wait(self, timeout: float | None = None) -> int | None:
        """The command's exit status (128 + the signal's number if one ended it); None if it still runs."""
        try:
            return self._supervisor.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End the whole tree; returns when it is gone."""
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError):
            self._supervisor.stdin.close()
        self._supervisor.wait()

    def memory(self) -> int:
        """Bytes of main memory the tree holds: proportional set sizes, in which shared pages count once in all."""
        return sum(proportional_set_size(process) for process in supervisor.descendants(self._supervisor.pid))

    def own_memory(self) -> int:
        """Bytes of that which no file on disk stands behind: what a leak would be in. Unlike `memory` it does not depend
        on which other processes have the same libraries loaded."""
        processes = supervisor.descendants(self._supervisor.pid)
        return sum(proportional_set_size(process, files=False) for process in processes)

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_bytes()[-20_000:].decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def proportional_set_size(process: int, files: bool = True) -> int:
    """Bytes, 0 for a process that has ended. Where the kernel does not tell it, the resident set size.

    files: also count pages of mapped files, such as libraries.
    """
    proportional = ("Pss:",) if files else ("Pss_Anon:", "Pss_Shmem:")
    resident = ("VmRSS:",) if files else ("RssAnon:", "RssShmem:")
    for file, fields in (("smaps_rollup", proportional), ("status", resident)):
        with contextlib.suppress(OSError):
            lines = map(str.split, Path(f"/proc/{process}/{file}").read_text().splitlines())
            sizes = [int(line[1]) * 1024 for line in lines if line[0] in fields]
            if len(sizes) == len(fields):
                return sum(sizes)
    return 0


class PeakMemory:
    """Samples a process's memory in the background; `peak` is the largest sum seen, in bytes."""

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


def wait_until(ready, process: SupervisedProcess, timeout: float, interval: float = 0.5) -> bool:
    """Poll `ready()` until it holds; False when the process ends first or the time is over."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.running:
        if ready():
            return True
        time.sleep(interval)
    return False

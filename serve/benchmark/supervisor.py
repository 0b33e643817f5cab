"""Runs one command and ends all of its processes when the process that asked for it ends, however that happens.

    python supervisor.py COMMAND...

The supervisor ends the command when its own standard input reaches end-of-file. That happens when the asking process
closes the pipe, is interrupted, crashes or is killed with SIGKILL; it need not run any handler. Descendants that detach
themselves are adopted by the supervisor, and ended too. This file imports nothing of ria_vllm, so that it starts fast
and needs little memory.
"""

import ctypes
import select
import signal
import subprocess
import sys
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 15.0


def end_tree(child: subprocess.Popen) -> None:
    """Terminate the command, which may take the grace period to end its own processes; kill what is then left."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    # Descendants that lose their parent become children of this process.
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def main(command: list[str]) -> int:
    """The command's exit status, or 128 + the number of the signal that ended it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # whoever ends this process closes its input; a child gets the default
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
    end_tree(child)
    status = child.poll() or 0
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs one command and ends all of its processes when the process that asked for it ends, however that happens.

    python supervisor.py COMMAND...

The supervisor ends the command when its own standard input reaches end-of-file. That happens when the asking process
closes the pipe, is interrupted, crashes or is killed with SIGKILL; it need not run any handler. Descendants that detach
themselves are adopted by the supervisor, and ended too. This file imports nothing of ria_vllm, so that it starts fast
and needs little memory.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 15.0


def end_tree(child: subprocess.Popen) -> None:
    """Terminate the command, then the processes that it leaves behind; kill those that outlive the grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    child.terminate()
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    # Descendants that lose their parent become children of this process: none is left when waitpid finds no child.
    with contextlib.suppress(ChildProcessError):
        while True:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.05)


def main(command: list[str]) -> int:
    """The command's exit status, or 128 + the number of the signal that ended it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
    end_tree(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs one command so that none of its processes outlives the process that asked for it, however that one ends.

    python supervisor.py COMMAND...

The command gets a session of its own. The supervisor ends it when it reads end-of-file on its standard input, which
comes when the asking process closes the pipe, is interrupted, crashes or is killed with SIGKILL: no handler of the
asking process has to run. Descendants that detach themselves are adopted by the supervisor and ended too. Imports
nothing but the standard library, so that it starts at once and needs little memory.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 15.0


def descendants(root: int) -> list[int]:
    """Process ids below `root`, from one pass over /proc; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/stat") as file:
                # The command's name stands in parentheses and may hold anything, so count from the last of them.
                state, parent = file.read().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def reap() -> None:
    """Collect adopted processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_all(number: int) -> None:
    for process in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def end_tree(child: subprocess.Popen) -> None:
    """Ask the command to stop, wait, then kill whatever is left of its tree."""
    if child.poll() is None:
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and descendants(os.getpid()):
        if child.poll() is not None:
            end_all(signal.SIGTERM)
            reap()
        time.sleep(0.1)
    while descendants(os.getpid()):
        end_all(signal.SIGKILL)
        child.poll()
        reap()
        time.sleep(0.05)
    child.poll()
    reap()


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # end-of-file is the one way to stop this process
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=default_signals)
    while child.poll() is None:
        if select.select([sys.stdin], [], [], 0.1)[0] and not os.read(sys.stdin.fileno(), 4096):
            break
    ended_by_itself = child.poll()
    end_tree(child)
    status = child.wait() if ended_by_itself is None else ended_by_itself
    return status if status >= 0 else 128 - status


def default_signals() -> None:
    """Ignored signals are inherited; the command must not inherit them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

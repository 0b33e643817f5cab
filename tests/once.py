"""What one run of the tests makes once, however many processes of pytest-xdist share the work."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Names the run's folder. The first process makes it, and hands it down to the others (see conftest.py).
VARIABLE = "RIA_VLLM_TESTS_SHARED"


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this run that `make` has filled. The first test that asks makes it; others wait until it is whole.

    Where `make` fails, the next test that asks tries again.
    """
    folder = Path(os.environ[VARIABLE]) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = Path(f"{folder}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder

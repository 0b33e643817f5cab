"""Test runs in several processes of pytest-xdist, each of which takes whole files."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

# The files that take longest start first, so that none of them is still running alone at the end.
LONGEST = (
    "tests/serve/kernels/cuda/test_emulated_kernels.py",
    "tests/serve/kernels/cpu/test_sanitized.py",
    "tests/offline/runtime/test_memory.py",
    "tests/serve/test_vllm.py",
    "tests/serve/benchmark/test_served_quality.py",
    "tests/serve/test_moe.py",
    "tests/offline/experts/test_peak_memory.py",
    "tests/offline/test_interruptions.py",
    "tests/demo/test_run.py",
    "tests/serve/test_server.py",
    "tests/serve/test_wheel.py",
    "tests/serve/kernels/cpu/test_experts.py",
    "tests/serve/kernels/cpu/test_int8_experts.py",
    "tests/serve/kernels/cpu/test_int8_inputs.py",
    "tests/offline/experts/test_experts.py",
    "tests/serve/test_pipeline.py",
)
GIBIBYTES_EACH = 6  # memory for each process: enough for a tiny model on four ranks
# The variable that names the folder the processes share. The first process creates it and hands it down.
SHARED = "RIA_VLLM_TESTS_SHARED"
KEPT = Path(__file__).parents[1] / ".work" / "tests"


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this run that `make` has filled. The first test that asks fills it; others wait until it is complete.

    If `make` fails, the next test that asks tries again.
    """
    folder = Path(os.environ[SHARED]) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = Path(f"{folder}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def kept(name: str, sources: Iterable[Path], flags: object, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, in this run or in an earlier one: what takes a compiler minutes.

    It is made anew if a source, or `flags`, which say what else decides, are other than then.
    """
    content = [path.read_bytes() for path in sorted(sources)]
    digest = hashlib.sha256(b"\0".join([*content, repr(flags).encode()])).hexdigest()[:16]
    KEPT.mkdir(parents=True, exist_ok=True)
    folder = KEPT / f"{name}-{digest}"
    with open(KEPT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in KEPT.glob(f"{name}-*"):
                shutil.rmtree(old)
            unfinished = KEPT / f"{name}-unfinished"
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: one process per core, if memory allows; only this process if single tests are named."""
    if any("::" in argument for argument in config.args):
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    processes = min(len(os.sched_getaffinity(0)), memory // (GIBIBYTES_EACH * 2**30))
    return processes if processes > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker: the process that started it has done all this
        return
    shared = tempfile.mkdtemp(prefix="ria-vllm-tests-")
    config.add_cleanup(lambda: shutil.rmtree(shared, ignore_errors=True))
    os.environ[SHARED] = shared
    processes = config.getoption("numprocesses", None)
    if processes:  # each gets its share of the cores, and the system chooses which: vLLM would bind all to the same
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {file: place for place, file in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))

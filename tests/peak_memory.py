"""The peak memory of a compression, in a process of its own."""

import os
import threading
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import preloaded


def peak_memory(small: Path, large: Path, out: Path, **options: Any) -> int:
    """Bytes that compressing `large` into `out` takes more than compressing `small`, with these options of `Recipe`."""
    return int(preloaded.run(Path(f"{out}.log"), _measure, small, large, out, options).split()[-1])


def _measure(small: Path, large: Path, out: Path, options: dict[str, Any]) -> None:
    """Print the peak above what the process holds after a small model: libraries, their tables and thread buffers."""
    from ria_vllm.offline.pruning import permute
    from ria_vllm.offline.pruning.admm import AdmmSolver
    from ria_vllm.offline.recipe import Recipe, Schedule
    from ria_vllm.offline.run.compress import Settings, compress
    from ria_vllm.progress import Monitor

    # What repeats takes as much memory the second time as the last: two iterations of ADMM are enough, two passes of
    # training, and one round of the search for a permutation.
    AdmmSolver.solve = partialmethod(AdmmSolver.solve, iterations=2)  # type: ignore[method-assign, assignment]
    Schedule.passes = lambda *_: 2  # type: ignore[method-assign]
    permute.WORTHWHILE = 1.0
    recipe = Recipe(**options)
    compress(str(small), Path(f"{out}-small"), recipe, Settings(), Monitor(shown=False))
    print(peak_of(lambda: compress(str(large), out, recipe, Settings(), Monitor(shown=False))), flush=True)
    os._exit(0)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that this process holds at the peak of `work`, more than before it."""
    base, peak = _held(), 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, _held())
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()
    work()
    return peak - base


def _held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

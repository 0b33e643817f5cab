"""How much memory tensors take, exactly: what torch's allocator gives out, not what the system sees of it.

So it does not depend on how busy a machine is, nor on what the C library keeps.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def traced(work: Callable[[], Any]) -> tuple[int, int]:
    """(the most bytes that `work` has at a time, besides what was there before; what its result still has of them).

    With one thread, because kernels on CPUs have buffers for each; without oneDNN, which takes scratch space as the
    processor has it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            torch.backends.mkldnn.flags(enabled=False),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler,
        ):
            kept = work()
    finally:
        torch.set_num_threads(threads)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak, now


def alive() -> dict[int, torch.UntypedStorage]:
    """Memory of all tensors that Python knows of, those that are mapped from files, too: address -> storage."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.layout == torch.strided:
            storage = one.untyped_storage()
            found[storage._cdata] = storage
    return found

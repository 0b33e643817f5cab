"""How much memory is free, and returning freed memory to the system.

The C library keeps freed blocks of up to 32 MB for itself. With the large, short-lived matrices that pruning a layer
needs, these would add up to the weights of several layers.
"""

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Blocks of this size or more are mapped one by one, so the system gets them back as soon as they are freed.
MAPPED_BLOCK = 4 << 20
# glibc maps larger ones in any case.
LARGEST_KEPT_BLOCK = 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_DEFAULT_TRIM_THRESHOLD = 128 << 10


def map_large_blocks() -> None:
    """Set MAPPED_BLOCK for the rest of the process. No effect if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BLOCK)


@contextmanager
def blocks_kept() -> Iterator[None]:
    """Let the C library keep freed blocks of up to LARGEST_KEPT_BLOCK until the end; afterwards as `map_large_blocks`.

    For loops whose steps need the same blocks again: the system clears each block that it maps anew, which takes longer
    than many an operation on it. No effect if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        trim()


def trim() -> None:
    """Return freed memory to the system. No effect if the C library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def available(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device without swapping; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s*(\d+) kB", _content(Path("/proc/meminfo")))
    limits = [int(found[1]) * 1024] if found else []
    # In a container, /proc/meminfo is the host's; the container's own limits are those of its control groups.
    group = Path("/sys/fs/cgroup") / _content(Path("/proc/self/cgroup")).strip().rpartition(":")[2].lstrip("/")
    for folder in (group, *group.parents):
        limit, used = (_content(folder / name).strip() for name in ("memory.max", "memory.current"))
        if limit.isdigit() and used.isdigit():
            # What was read from files counts as used, but the system gives it up when memory is needed.
            cached = re.findall(r"^(?:in)?active_file (\d+)$", _content(folder / "memory.stat"), re.MULTILINE)
            limits.append(max(0, int(limit) - int(used) + sum(map(int, cached))))
    return min(limits, default=None)


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

"""What memory there is, and giving freed memory back to the system.

The C library keeps freed blocks for itself, up to 32 MB each. Between the large, short-lived matrices that pruning a
layer takes, these would add up to several layers' weights.
"""

import ctypes
import re
from pathlib import Path

import torch

# Blocks from here on are mapped by themselves, and go back to the system when they are freed.
MAPPED_BLOCK = 4 << 20
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def map_large_blocks() -> None:
    """For the rest of the process; without effect where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BLOCK)


def trim() -> None:
    """Return what has been freed."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def available(device: torch.device) -> int | None:
    """Bytes that can be had on a device without driving anything else out; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s*(\d+) kB", _content(Path("/proc/meminfo")))
    limits = [int(found[1]) * 1024] if found else []
    # In a container the system's figures are the host's.
    group = Path("/sys/fs/cgroup") / _content(Path("/proc/self/cgroup")).strip().rpartition(":")[2].lstrip("/")
    for folder in (group, *group.parents):
        limit, used = (_content(folder / name).strip() for name in ("memory.max", "memory.current"))
        if limit.isdigit() and used.isdigit():
            limits.append(max(0, int(limit) - int(used)))
    return min(limits, default=None)


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

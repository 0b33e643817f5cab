"""Giving freed memory back to the system."""

import ctypes


def trim() -> None:
    """Return what has been freed.

    The C library keeps freed blocks below a growing threshold for itself. Between the large, short-lived matrices of
    two stages of a layer they would add up to several layers' weights.
    """
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim_heap is not None:
        trim_heap(0)

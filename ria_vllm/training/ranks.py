"""What several ranks do together fails on all of them, or on none: a rank that goes on alone would wait forever."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ria_vllm.errors import RiaError

T = TypeVar("T")


def is_first() -> bool:
    """Whether this is the rank that reads and writes for all, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def together(work: Callable[[], T], alone: bool = False) -> T:
    """What `work` returns on this rank.

    Args:
        alone: no other rank calls this, although there are others.

    Raises:
        RiaError: `work` has failed on another rank. What it raises on this rank is passed on.
    """
    if alone or not dist.is_initialized():
        return work()
    result, failure = None, None
    try:
        result = work()
    except BaseException as error:
        failure = error
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, failure and (str(failure) or type(failure).__name__))
    if failure is not None:
        raise failure
    for rank, message in enumerate(said):
        if message:
            raise RiaError(f"Rank {rank} has failed: {message}")
    return result  # type: ignore[return-value]

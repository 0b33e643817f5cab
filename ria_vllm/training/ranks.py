"""What several ranks do together fails on all of them, or on none: a rank that goes on alone would wait forever."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ria_vllm.errors import RiaError

T = TypeVar("T")


def together(work: Callable[[], T], alone: bool) -> T:
    """What `work` returns on this rank.

    Args:
        alone: whether no other rank calls this.

    Raises:
        RiaError: `work` has failed on another rank. What it raises on this rank is passed on.
    """
    if alone:
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

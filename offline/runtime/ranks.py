"""The processes of a torchrun, or the single one without it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ria_vllm.offline.runtime.device import take_own_gpu

# While the first rank fetches, converts, samples or writes alone, the others wait, which may take longer than torch's
# default of 10 or 30 minutes. If a rank dies, torchrun notices and ends them all.
TIMEOUT = timedelta(days=7)


class Ranks:
    """This process among `size`. With size 1 every method is trivial and no process group exists."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """A picklable object of rank `src`, on every rank; what the other ranks pass is ignored."""
        if self.size == 1:
            return value
        holder = [value if self.rank == src else None]
        dist.broadcast_object_list(holder, src=src)
        return holder[0]

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        return max(self.broadcast(value, src) for src in range(self.size))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def partition_by_cost(self, costs: Sequence[float]) -> list[int]:
        """The rank for each job: the most expensive jobs are assigned first, each to the rank with the least work."""
        load = [0.0] * self.size
        owner = [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
            owner[job] = min(range(self.size), key=lambda r: (load[r], r))
            load[owner[job]] += costs[job]
        return owner

    def share(self, jobs: int, rank: int | None = None) -> range:
        """The consecutive part of `jobs` equal jobs that a rank does (this one, if `rank` is None)."""
        rank = self.rank if rank is None else rank
        return range(rank * jobs // self.size, (rank + 1) * jobs // self.size)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, if there is one.

    A CUDA device without an index becomes this process's own, the one with its local rank.

    Raises:
        RiaError: more processes than CUDA devices on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        take_own_gpu(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

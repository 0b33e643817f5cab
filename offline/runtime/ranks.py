"""The processes of a torchrun, or the single one without it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ria_vllm.errors import RiaError

# While the first rank fetches, converts, samples or writes alone, the others wait. For torch's own 10 or 30 minutes
# that would be a failure; one that dies is seen by torchrun, which ends them all.
TIMEOUT = timedelta(days=7)


class Ranks:
    """This process among `size`. With size 1 every method is trivial and no process group exists."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def from_first(self, value: Any) -> Any:
        """Any picklable object of rank 0, on every rank."""
        return self.from_owner(value, 0)

    def from_owner(self, value: Any, owner: int) -> Any:
        if self.size == 1:
            return value
        holder = [value if self.rank == owner else None]
        dist.broadcast_object_list(holder, src=owner)
        return holder[0]

    def divide(self, costs: Sequence[float]) -> list[int]:
        """The owner of each job: the dearest jobs first, each to the rank with the least to do."""
        load = [0.0] * self.size
        owner = [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
            owner[job] = min(range(self.size), key=lambda r: (load[r], r))
            load[owner[job]] += costs[job]
        return owner

    def share(self, jobs: int, rank: int | None = None) -> range:
        """The consecutive part of `jobs` equal jobs that a rank (this one if none is named) has."""
        rank = self.rank if rank is None else rank
        return range(rank * jobs // self.size, (rank + 1) * jobs // self.size)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, if there is one.

    A CUDA device without a number becomes this process's own: the one that its number on this machine names.

    Raises:
        RiaError: more processes than CUDA devices on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        _take_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _take_device(device: torch.device) -> None:
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise RiaError(
            f"--device cuda: process {index} of this machine has no CUDA device of its own; torch sees {count}. Use "
            "--nproc-per-node with at most as many."
        )
    torch.cuda.set_device(index)

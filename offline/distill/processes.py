"""The processes of a distillation, which accelerate joins."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.runtime.ranks import TIMEOUT, Ranks

# Where accelerate finds out how many processes there are: torchrun sets the first, MPI one of the others.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launch() -> None:
    """Check that `accelerate launch` has started all processes that it was told to start.

    Without several GPUs it starts one, and all that the environment then has of a larger number is an address at which
    processes could meet.

    Raises:
        RiaError: it has started one in the place of several.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and not any(name in os.environ for name in SIZES):
        raise RiaError(
            "`accelerate launch` has started one process, though several were asked for (MASTER_ADDR is set): without "
            "several GPUs, it leaves that to MPI (--mpirun_hostfile). Use `torchrun --nproc-per-node N -m ria_vllm "
            "distill ...`, or give accelerate --num_processes 1."
        )


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that `accelerate launch` or torchrun has started, each with a device of its own.

    Yields:
        (the processes, the device of this one).

    Raises:
        RiaError: see `check_launch`.
    """
    check_launch()
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    try:
        yield Ranks(accelerator.process_index, accelerator.num_processes), accelerator.device
    finally:
        accelerator.end_training()

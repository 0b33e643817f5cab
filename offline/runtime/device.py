"""The device that a run computes on."""

import os

import torch

from ria_vllm.errors import RiaError


def choose_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda; auto is CUDA if torch sees such a device.

    Raises:
        RiaError: cuda, and torch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RiaError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    return torch.device(name)


def take_own_gpu(device: torch.device) -> None:
    """Make `device` this process's current CUDA device; without an index, the one with the process's local rank.

    Raises:
        RiaError: more processes than CUDA devices on this machine.
    """
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise RiaError(
            f"--device cuda: process {index} of this machine has no CUDA device of its own; torch sees {count}. Start "
            "at most that many processes (--nproc-per-node)."
        )
    torch.cuda.set_device(index)

"""The device that a run computes on."""

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

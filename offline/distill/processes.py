"""The processes of a distillation, which accelerate joins."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ria_vllm.offline.runtime.ranks import TIMEOUT, Ranks


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that `accelerate launch` or torchrun has started, each with a device of its own.

    Yields:
        (the processes, the device of this one).
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    try:
        yield Ranks(accelerator.process_index, accelerator.num_processes), accelerator.device
    finally:
        accelerator.end_training()

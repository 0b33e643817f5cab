"""Commands and functions in processes of their own, which are forked from one that has imported what they need.

These imports take several times longer than what tests do with a tiny model.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The offline stage as its commands use it, what transformers imports only for some model, and what trains.
IMPORTED = (
    "ria_vllm.offline.commands", "ria_vllm.offline.compress", "ria_vllm.offline.distill.command",
    "ria_vllm.offline.distill.run", "ria_vllm.training", "accelerate", "scipy.optimize", "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip
TIMEOUT = 600.0  # seconds until the first of the processes that run, or the next one, ends


def start(log: Path, function: Callable[..., object], *arguments: Any, ranks: int = 1) -> Sequence[BaseProcess]:
    """Start processes that call the function, with one thread each, and append what they print to `log`.

    Args:
        function: one that another process can import.
        ranks: so many processes; several find their group in the environment, as those of a torchrun do.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    processes = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(ranks):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        processes.append(context.Process(target=_call, args=(log, group if ranks > 1 else {}, function, arguments)))
        processes[-1].start()
    return processes


def run(log: Path, function: Callable[..., object], *arguments: Any, ranks: int = 1) -> str:
    """What processes as `start` has them print until they end. If one fails or hangs, the others are killed."""
    processes = start(log, function, *arguments, ranks=ranks)
    while running := [process for process in processes if process.exitcode is None]:
        ended = multiprocessing.connection.wait([process.sentinel for process in running], TIMEOUT)
        if not ended or any(process.exitcode for process in processes):
            kill(running)
    printed = log.read_text()
    assert not any(process.exitcode for process in processes), printed[-6000:]
    return printed


def kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def ria_vllm(*arguments: object) -> None:
    """The command `ria-vllm`, for the functions above."""
    from ria_vllm.cli import main

    sys.argv = ["ria-vllm", *map(str, arguments)]
    main()


def _call(log: Path, group: dict[str, object], function: Callable[..., object], arguments: Sequence[Any]) -> None:
    import torch

    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in group.items()} | {"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    function(*arguments)

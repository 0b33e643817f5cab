"""Commands and functions in processes of their own, which are forked from one that has imported what they need.

These imports take several times longer than what tests do with a tiny model. vLLM is not among them: memory is measured
in these processes. `forked` has those with vLLM.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The offline stage as its commands use it, what transformers imports only for some model, and what trains.
IMPORTED = (
    "ria_vllm.offline.commands", "ria_vllm.offline.run.compress", "ria_vllm.offline.distill.command",
    "ria_vllm.offline.distill.run", "ria_vllm.training", "accelerate", "scipy.optimize", "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip
TIMEOUT = 600.0  # seconds until the first of the processes that run, or the next one, ends


@contextmanager
def started(
    log: Path, function: Callable[..., object], *arguments: Any, ranks: int = 1
) -> Iterator[Sequence[BaseProcess]]:
    """Processes that call the function, with one thread each, and append what they print to `log`.

    They are killed at the end, and if pytest is killed.

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
    try:
        for rank in range(ranks):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}  # fmt: skip
            environment = os.environ | {name: str(value) for name, value in group.items()} | {"OMP_NUM_THREADS": "1"}
            process = context.Process(target=_call, args=(log, environment, function, arguments))
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def run(log: Path, function: Callable[..., object], *arguments: Any, ranks: int = 1) -> str:
    """What processes as `started` has them print until they end. If one fails or hangs, the others are killed."""
    with started(log, function, *arguments, ranks=ranks) as processes:
        while running := [process for process in processes if process.exitcode is None]:
            ended = multiprocessing.connection.wait([process.sentinel for process in running], TIMEOUT)
            if not ended or any(process.exitcode for process in processes):
                break
        done = [process.exitcode for process in processes]
    assert done == [0] * ranks, (done, log.read_text()[-6000:])
    return log.read_text()


def ria_vllm(*arguments: object) -> None:
    """The command `ria-vllm`, for the functions above."""
    from ria_vllm.cli import main

    sys.argv = ["ria-vllm", *map(str, arguments)]
    main()


def _call(log: Path, environment: dict[str, str], function: Callable[..., object], arguments: Sequence[Any]) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    missing = [name for name in IMPORTED if name not in sys.modules]
    assert not missing, f"not imported before the fork: {missing}"
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def _end_with_parent() -> None:
    """The process that forks lives as long as its forks. So these watch pytest themselves."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

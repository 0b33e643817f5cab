"""The work folder of a run: one owner at a time, and all processes of the owner."""

import gc
import os
from pathlib import Path

import preloaded
import pytest
import torch

from ria_vllm.checkpoint.lock import locked
from ria_vllm.errors import RiaError
from ria_vllm.offline.run.work import work_folder
from ria_vllm.offline.runtime.ranks import Ranks, joined
from ria_vllm.offline.stored_layers import layer_key

RUN = {"exponent": 1}


def another_has(folder: Path) -> bool:
    """Whether a process other than this one gets the folder."""
    child = os.fork()
    if not child:
        try:
            locked(folder)
        except RiaError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_failed_run_that_is_still_referred_to_does_not_unlock_a_later_one(tmp_path):
    """A process loses its lock when it closes any descriptor of the file."""
    failed = work_folder(tmp_path / "out", RUN, False, False, Ranks())
    with pytest.raises(RiaError, match="wrong. Finished layers"):
        with failed as first:
            first.write(layer_key(0), {})
            raise RiaError("wrong.")
    with work_folder(tmp_path / "out", RUN, False, True, Ranks()) as second:
        assert second.has(layer_key(0))
        del first, failed
        gc.collect()
        assert not another_has(tmp_path / "out.partial")
    assert another_has(tmp_path / "out.partial")


def begin(out: Path, apart: bool) -> None:
    """Begin a run, as one of its processes, which may be on a machine with a file system of its own."""
    with joined(torch.device("cpu")) as ranks:
        out = out / str(ranks.rank) if apart else out
        try:
            with work_folder(out / "out", RUN, False, True, ranks) as writer:
                writer.write(f"of-{ranks.rank}", {})
                ranks.barrier()
                print(f"process {ranks.rank} sees both: {writer.has('of-0') and writer.has('of-1')}")
                ranks.barrier()
        except RiaError as error:
            print(f"process {ranks.rank}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_do_not_see_the_same_folder_say_so_at_once(stale, tmp_path):
    if stale:  # what an earlier run has left there
        for rank in ("0", "1"):
            with pytest.raises(KeyboardInterrupt):
                with work_folder(tmp_path / rank / "out", RUN, False, False, Ranks()):
                    raise KeyboardInterrupt
            (tmp_path / rank / "out.partial" / "shared").write_text("of another run")
    said = preloaded.run(tmp_path / "log", begin, tmp_path, True, ranks=2)
    for rank in (0, 1):
        place = tmp_path / str(rank) / "out.partial" / "shared"
        assert f"process {rank}: {place}: not found by process 1, though the first one has written it" in said
    assert not (tmp_path / "0" / "out.partial").exists()

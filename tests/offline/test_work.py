"""The work folder of a run: one owner at a time."""

import gc
import os
from pathlib import Path

import pytest

from ria_vllm.checkpoint.lock import locked
from ria_vllm.errors import RiaError
from ria_vllm.offline.run.work import work_folder
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
    failed = work_folder(tmp_path / "out", RUN, False, False)
    with pytest.raises(RiaError, match="wrong. Finished layers"):
        with failed as first:
            first.write(layer_key(0), {})
            raise RiaError("wrong.")
    with work_folder(tmp_path / "out", RUN, False, True) as second:
        assert second.has(layer_key(0))
        del first, failed
        gc.collect()
        assert not another_has(tmp_path / "out.partial")
    assert another_has(tmp_path / "out.partial")

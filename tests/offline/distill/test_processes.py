"""Runs in several processes."""

import os
import subprocess
import sys
import time

import preloaded
import pytest
import torch
from compressing import digests, weight_digests
from distilling import command, has_reached
from torch.distributed.tensor import DTensor

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.distill import train
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor


def test_a_process_that_does_not_see_the_text_says_so(pruned, text, tmp_path, monkeypatch):
    """Such as on another machine, with a file system of its own."""
    dense, folder = pruned()
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value, src=0: True)
    with pytest.raises(RiaError, match=r"text\.safetensors: not found by process 0.*All processes must see the same"):
        distill(folder, str(dense), tmp_path / "out", Distillation(tokens=1024, seq_len=64), Settings(), Monitor(False))


def ask_in_parts(*arguments: object) -> None:
    """The command; it fails if the teacher is asked while a process has the whole of a layer."""
    read = train.read

    def checked(teacher, tokens):
        assert all(isinstance(parameter, DTensor) for parameter in teacher.layers.parameters())
        return read(teacher, tokens)

    train.read = checked
    preloaded.ria_vllm(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--self-written", "0.5"],
        ["--shard", "--calibration", "self", "--text-loss", "1"],
        ["--shard"],
    ],
    ids=str,
)
def test_two_processes_give_what_one_gives(options, pruned, text, tmp_path):
    # Step 0 must not be the best of those that are measured. So nothing is reconstructed: there is much to recover. But
    # what a random model writes teaches nothing about words, so there the last step is kept.
    dense, folder = pruned(reconstruct="none", weights="int8" if options == ["--shard"] else "float")
    for name, ranks in (("one", 1), ("two", 2)):
        # One process has two micro-batches, whose gradients it adds up; of two, each has one by default.
        parts = ["--micro-batch", "1"] if ranks == 1 else []
        arguments = command(dense, folder, tmp_path / name, text, *options, *parts, held_out="self" not in options)
        command_line = ask_in_parts if "--shard" in options and ranks == 2 else preloaded.ria_vllm
        preloaded.run(tmp_path / "log", command_line, *arguments, ranks=ranks)
    stories = [Reader(tmp_path / name).schema.recipe["distill"][0] for name in ("one", "two")]
    differing = {key for key in stories[0] if stories[0][key] != stories[1][key]}
    assert differing == ({"processes", "shard"} if "--shard" in options else {"processes"})
    if "--shard" not in options:
        assert weight_digests(tmp_path / "one") == weight_digests(tmp_path / "two")
        return
    # FSDP adds gradients up in the weights' dtype before kept entries are taken: the same numbers, rounded otherwise.
    one, two, before = Reader(tmp_path / "one"), Reader(tmp_path / "two"), Reader(folder)
    moved = set()
    for name in one.files:
        a, b, first = (reader.tensor(name).double() for reader in (one, two, before))
        moved |= {name.rpartition(".")[2]} if (a != first).any() else set()
        if name.endswith(".compressed") and one.tensor(name).dtype == torch.int8:
            assert (a - b).abs().max() <= 1 and (a != b).double().mean() < 0.01, name
        else:
            assert torch.allclose(a, b, rtol=1e-3, atol=0.05 * float((a - first).abs().max()) + 1e-9), name
    assert "compressed" in moved and ("weight_scale" in moved) == (options == ["--shard"])


@pytest.mark.slow
def test_a_divided_run_that_was_killed_is_resumed(pruned, text, tmp_path):
    dense, folder = pruned()
    log, whole = tmp_path / "log", command(dense, folder, tmp_path / "whole", text, "--shard")
    preloaded.run(log, preloaded.ria_vllm, *whole, ranks=2)
    out, units = tmp_path / "killed", tmp_path / "killed.partial" / "units"
    again = command(dense, folder, out, text, "--shard", "--resume")
    with preloaded.started(log, preloaded.ria_vllm, *again, ranks=2) as (_, second):
        while second.is_alive() and not has_reached(units, "state-*-1-of-2*", 6):
            time.sleep(0.002)
    assert not out.exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, "-m", "ria_vllm", *again], check=True, capture_output=True, env=environment)
    assert digests(tmp_path / "whole") == digests(out)

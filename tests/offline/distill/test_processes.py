"""Runs in several processes."""

import preloaded
import pytest
from compressing import weight_digests
from distilling import command

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--self-written", "0.5"], ["--calibration", "self", "--text-loss", "1"]],
    ids=str,
)
def test_two_processes_give_what_one_gives(options, pruned, text, tmp_path):
    # Step 0 must not be the best of those that are measured. So nothing is reconstructed: there is much to recover. But
    # what a random model writes teaches nothing about words, so there the last step is kept.
    dense, folder = pruned(reconstruct="none", weights="int8" if "self" in options else "float")
    for name, ranks in (("one", 1), ("two", 2)):
        # One process has two micro-batches, whose gradients it adds up; of two, each has one by default.
        parts = ["--micro-batch", "1"] if ranks == 1 else []
        arguments = command(dense, folder, tmp_path / name, text, *options, *parts, held_out="self" not in options)
        preloaded.run(tmp_path / "log", preloaded.ria_vllm, *arguments, ranks=ranks)
    stories = [Reader(tmp_path / name).schema.recipe["distill"][0] for name in ("one", "two")]
    differing = {key for key in stories[0] if stories[0][key] != stories[1][key]}
    assert differing == {"processes"}
    assert weight_digests(tmp_path / "one") == weight_digests(tmp_path / "two")

"""A model divided between two processes says the same as the whole one, and each process has half of it."""

from pathlib import Path

import preloaded
import pytest
import torch

from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.offline.calibration.data import from_model
from ria_vllm.offline.distill.logits import TwoPart
from ria_vllm.offline.distill.processes import joined
from ria_vllm.offline.distill.sharding import local, shard
from ria_vllm.offline.distill.teacher import CachedTeacher, Teacher, fill_cache, most_probable
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.progress import Monitor

CPU, QUIET = torch.device("cpu"), Monitor(shown=False)


def divided(dense: Path, out: Path) -> None:
    windows = torch.randint(2, 250, (5, 20), generator=torch.Generator().manual_seed(0))
    with joined(CPU) as (ranks, device):
        model = TwoPart(load_model(str(dense), device).requires_grad_(False), "teacher")
        sizes = {name: parameter.numel() for name, parameter in model.layers.named_parameters()}

        def said() -> list[torch.Tensor]:
            answer = Teacher(model, layers=True).answer(windows, [])
            text = from_model(model.model, 1, 3, 16, 0, QUIET)
            return [answer.hidden, *answer.layers, model.logits(answer.hidden), text]

        before, top = said(), [most_probable(model, window, 4, 1.0).tokens for window in windows]
        shard(model, device)
        assert all(torch.equal(one, other) for one, other in zip(before, said(), strict=True))
        for name, parameter in model.layers.named_parameters():
            assert local(parameter).numel() == sizes[name] // 2, name
        # Five windows: one process has another one to write, which it can only ask about together with the other.
        writer, mine = CheckpointWriter(out / f"{ranks.rank}"), ranks.share(5)
        fill_cache(writer, model, windows, 4, 1.0, QUIET, mine, ranks.largest)
        for number in range(5):
            assert writer.has(f"teacher-{number:08d}") == (number in mine)
        found = CachedTeacher(writer, device).answer(windows[list(mine)], list(mine)).top.tokens
        assert torch.equal(found, torch.cat([top[number] for number in mine]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_divided_teacher_says_what_the_whole_one_says(family, tiny, tmp_path):
    preloaded.run(tmp_path / "log", divided, tiny(family), tmp_path / "out", ranks=2)

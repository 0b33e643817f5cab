"""A model divided between two processes says the same as the whole one, and each process has half of it."""

from pathlib import Path

import preloaded
import pytest
import torch

from ria_vllm.offline.calibration.data import from_model
from ria_vllm.offline.distill.sharding import local, shard
from ria_vllm.offline.distill.teacher.teacher import read
from ria_vllm.offline.distill.teacher.two_part import TwoPart
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.offline.runtime.ranks import joined
from ria_vllm.progress import Monitor

CPU, QUIET = torch.device("cpu"), Monitor(shown=False)


def divided(dense: Path) -> None:
    windows = torch.randint(2, 250, (5, 20), generator=torch.Generator().manual_seed(0))
    with joined(CPU):
        model = TwoPart(load_model(str(dense), CPU).requires_grad_(False), "teacher")
        sizes = {name: parameter.numel() for name, parameter in model.layers.named_parameters()}

        def said() -> list[torch.Tensor]:
            hidden = read(model, windows)
            return [hidden, model.logits(hidden), from_model(model.model, 1, 3, 16, 0, QUIET)]

        before = said()
        shard(model, CPU)
        assert all(torch.equal(one, other) for one, other in zip(before, said(), strict=True))
        for name, parameter in model.layers.named_parameters():
            assert local(parameter).numel() == sizes[name] // 2, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2"])
def test_a_divided_teacher_says_what_the_whole_one_says(family, tiny, tmp_path):
    preloaded.run(tmp_path / "log", divided, tiny(family), ranks=2)

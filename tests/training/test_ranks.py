"""Several processes (gloo, CPU): FSDP2, alone and by accelerate, and DDP train and save what one process does."""

from pathlib import Path

import preloaded
import pytest
import ranks
import torch
from ranks import STEPS, MovesEverything
from safetensors.torch import load_file
from sparse_llama import TOKENS, load, loss_of, masks, outside

from ria_vllm.checkpoint.reader import Reader


def alone(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the same steps in one process, without hooks: masked by hand."""
    model, kept = load(folder), masks(folder)
    optimizer = MovesEverything(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = TOKENS[step : step + 4]
        ((loss_of(model, batch[::2]) + loss_of(model, batch[1::2])) / 2).backward()
        for name, mask in kept.items():
            model.get_parameter(name).grad *= mask
        optimizer.step()
        with torch.no_grad():
            for name, mask in kept.items():
                model.get_parameter(name).mul_(mask)
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp-one", "fsdp-bf16", "fsdp-accumulated", "ddp", "accelerate"])
def test_two_processes_do_what_one_does(pruned_llama, tmp_path, kind):
    preloaded.run(tmp_path / "log", ranks.main, pruned_llama.folder, tmp_path, kind, ranks=2)
    found, want = load_file(tmp_path / "state.safetensors"), alone(pruned_llama.folder)
    before = load(pruned_llama.folder).state_dict()
    assert found.keys() == want.keys()
    for name, tensor in found.items():
        if kind == "fsdp-bf16":
            off, moved = tensor - want[name], want[name] - before[name]
            assert off.norm() < 0.05 * moved.norm(), name
        else:
            torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-5)
    assert list(Reader(tmp_path / "new").problems()) == []
    again = load(tmp_path / "new", torch.bfloat16)
    assert list(outside(again, masks(pruned_llama.folder))) == []
    assert all(torch.equal(tensor, found[name].to(torch.bfloat16)) for name, tensor in again.state_dict().items())


@pytest.mark.slow
def test_fsdp1_is_refused(pruned_llama, tmp_path):
    preloaded.run(tmp_path / "log", ranks.main, pruned_llama.folder, tmp_path, "fsdp1-original", ranks=2)


@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all(pruned_llama, tmp_path):
    preloaded.run(tmp_path / "log", ranks.main, pruned_llama.folder, tmp_path, "failures", ranks=2)

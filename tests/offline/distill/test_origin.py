"""A teacher on the hub is one commit, whatever becomes of the repository: huggingface_hub reads its own cache here."""

from pathlib import Path

import pytest
import torch
from compressing import edit_weights, run_small
from hub_cache import NAME, Cache

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.distill.train import Training
from ria_vllm.progress import Monitor

OLD, NEW = "0" * 39 + "a", "0" * 39 + "b"


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> Cache:
    """A repository with two commits, the main branch at the old one."""
    cache = Cache(tmp_path / "cache", tiny("llama"), monkeypatch, (OLD, NEW))
    edit_weights(cache.commit(NEW), lambda tensors: {n: 0.5 * t if t.dim() == 2 else t for n, t in tensors.items()})
    return cache


def run(folder: Path, teacher: str | Path, out: Path, text: Path, settings: Settings = Settings()) -> dict:
    recipe = Distillation(tokens=512, seq_len=64, text=str(text), lr=1e-3)
    (story,) = distill(folder, str(teacher), out, recipe, settings, Monitor(shown=False))["recipe"]["distill"]
    return story


def same_weights(one: Path, other: Path) -> bool:
    a, b = Reader(one), Reader(other)
    return all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.files)


def interrupt(patch: pytest.MonkeyPatch) -> None:
    step = Training._step
    patch.setattr(Training, "_step", lambda self, number: 1 / 0 if number == 2 else step(self, number))


def test_the_recipe_names_the_commit_that_taught(hub, pruned, text, tmp_path):
    _, folder = pruned()
    story = run(folder, hub.commit(NEW), tmp_path / "local", text)
    assert "teacher_revision" not in story and "teacher_weights_digest" in story
    hub.move_to(NEW)
    story = run(folder, NAME, tmp_path / "out", text)
    assert (story["teacher"], story["teacher_revision"]) == (NAME, NEW) and "teacher_weights_digest" not in story
    assert same_weights(tmp_path / "out", tmp_path / "local")


def test_a_run_goes_on_with_its_own_commit(hub, pruned, text, tmp_path, monkeypatch):
    _, folder = pruned()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        interrupt(patch)
        run(folder, NAME, tmp_path / "out", text, Settings(save_every=0))
    hub.move_to(NEW)
    story = run(folder, NAME, tmp_path / "out", text, Settings(resume=True))
    assert story["teacher_revision"] == OLD


def test_the_commit_that_was_pruned_teaches(hub, text, tmp_path):
    run_small(NAME, tmp_path / "pruned", text)
    recipe = Reader(tmp_path / "pruned").schema.recipe
    assert recipe["source_revision"] == OLD and "source_weights_digest" not in recipe
    hub.move_to(NEW)
    assert run(tmp_path / "pruned", NAME, tmp_path / "out", text)["teacher_revision"] == OLD

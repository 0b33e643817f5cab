"""Inputs that change during a run: the result is of one input, or there is an error and no result."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from changing import Moments, replace_by, touch, truncate, watched
from click.testing import CliRunner
from compressing import digests, edit_config, edit_weights
from distilling import run as distilled
from mutations import other_run
from transformers import AutoModelForCausalLM

import ria_vllm  # noqa: F401  (teaches from_pretrained to read compressed folders)
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.offline.distill.run import Settings as DistillSettings
from ria_vllm.offline.distill.train import Training
from ria_vllm.offline.evaluation.evaluate import evaluate
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor
from ria_vllm.training import save


def run_compress(place: Path, out: Path, settings: Settings = Settings(), **options) -> Any:
    fixed = {"calibration": str(place / "text.txt"), "samples": 4, "seq_len": 32, "reconstruct": "none"}
    compress(str(place / "dense"), out, Recipe(**fixed | options), settings, Monitor(shown=False))
    return digests(out)


def run_distill(place: Path, out: Path, **options) -> Any:
    held_out = {"eval_text": (str(place / "held_out.txt"),), "eval_tokens": 128, "evals": 2}
    fixed = {"tokens": 4 * 32, "seq_len": 32} | held_out
    distilled(place / "dense", place / "folder", out, place / "text.txt", **fixed | options)
    return digests(out)


def run_export(place: Path, out: Path) -> Any:
    export_dense(Reader(place / "folder"), out, 1 << 40)
    return digests(out)


def run_eval(place: Path, out: Path) -> Any:
    arguments = [place / "folder", "--baseline", place / "dense", "--eval-data", place / "text.txt"]
    words = ["--eval-tokens", "200", "--seq-len", "64", "--json"]
    found = json.loads(CliRunner().invoke(evaluate, [*map(str, arguments), *words], catch_exceptions=False).stdout)
    return found["perplexity"], found["baseline"]["perplexity"]


def run_save(place: Path, out: Path) -> Any:
    """The model was loaded, and trained, from a folder like this one before."""
    save(model_of(place / "loaded"), out, like=place / "folder")
    return digests(out)


def model_of(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


# What runs, its inputs, and in how many cases.
RUNS: dict[str, tuple[Callable[[Path, Path], Any], list[str], int]] = {
    "compress": (run_compress, ["dense", "text.txt"], 8),
    "distill": (run_distill, ["folder", "dense", "text.txt", "held_out.txt"], 4),
    "export": (run_export, ["folder"], 12),
    "eval": (run_eval, ["folder", "dense", "text.txt"], 8),
    "save": (run_save, ["folder"], 12),
}


@dataclass(frozen=True)
class World:
    """one: a place with all inputs. other: with others of the same names."""

    one: Path
    other: Path

    def files(self, inputs: list[str]) -> list[Path]:
        """Those that both have, relative to the place."""
        places = [self.one / name for name in inputs]
        found = [path for place in places for path in [place, *place.rglob("*")] if path.is_file()]
        return sorted(path.relative_to(self.one) for path in found)


@pytest.fixture(scope="module")
def world(pruned_llama, tmp_path_factory) -> World:
    place = tmp_path_factory.mktemp("world")
    one, other = place / "one", place / "other"
    for here, words in ((one, "the quick brown fox jumps over the lazy dog. "), (other, "pack my box with jugs. ")):
        shutil.copytree(pruned_llama.source, here / "dense")
        shutil.copytree(pruned_llama.folder, here / "loaded")
        (here / "text.txt").write_text(words * 60)
        (here / "held_out.txt").write_text(words[::-1] * 60)
    shutil.copytree(pruned_llama.folder, one / "folder")
    other_run(pruned_llama.folder, other / "folder")
    edit_weights(other / "dense", lambda tensors: {name: tensor * 0.75 for name, tensor in tensors.items()})
    for folder in ("dense", "folder"):
        edit_config(other / folder, rms_norm_eps=0.1)
        path = other / folder / "tokenizer.json"
        words = json.loads(path.read_text())
        vocabulary = words["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
        path.write_text(json.dumps(words))
        (other / folder / "chat_template.jinja").write_text("{{ messages }}")
    return World(one, other)


@pytest.mark.parametrize("command", RUNS)
def test_the_result_is_of_one_input_or_an_error(command, world, tmp_path):
    """For random files, changes and moments: the same on every run, or others and more with RIA_VLLM_EXAMPLES=N."""
    run, inputs, cases = RUNS[command]
    numbers = iter(range(1 << 20))

    def attempt(file: Path | None, change: Callable[[Path], None] = touch, at: int = 0) -> tuple[Any, int]:
        """The result, None after an error, and how many moments there were. At 0, `file` is changed before the run."""
        place = tmp_path / str(next(numbers)) / "place"
        shutil.copytree(world.one, place)
        if file is not None and at == 0:
            change(place / file)
        moments, found = Moments(at, lambda: change(place / file)), None
        try:
            with watched(place, moments):
                found = run(place, place.parent / "out")
        except RiaError:
            assert not (place.parent / "out").exists()
        return found, moments.number

    def changes(file: Path) -> dict[str, Callable[[Path], None]]:
        other = replace_by(world.other / file)
        return {"replaced": other, "all replaced": other, "truncated": truncate, "touched": touch}

    @cache
    def of_the_other(file: Path, how: str) -> Any:
        return attempt(file, changes(file)[how])[0]

    of_one, total = attempt(None)
    assert of_one is not None and total > 10
    more = int(os.environ.get("RIA_VLLM_EXAMPLES", "1"))
    draw, files, errors = random.Random(0 if more == 1 else None), world.files(inputs), 0
    for number in range(cases * more):
        file, at = draw.choice(files), draw.randint(1, total)
        how = ("replaced", "all replaced", "truncated", "touched")[number % 4]
        file = Path(file.parts[0]) if how == "all replaced" else file
        found, _ = attempt(file, changes(file)[how], at)
        assert found in (None, of_one) or found == of_the_other(file, how), (file, how, at)
        errors += found is None
    assert errors


@pytest.fixture
def place(world, tmp_path) -> Path:
    """A copy of all inputs, to change."""
    return Path(shutil.copytree(world.one, tmp_path / "place"))


def test_a_dense_model_that_is_saved_again_is_noticed_after_the_next_layer(place, world, tmp_path, monkeypatch):
    out, weights, kept = tmp_path / "out", place / "dense" / "model.safetensors", tmp_path / "kept"
    whole = run_compress(place, tmp_path / "whole")
    write = CheckpointWriter.write

    def saved_again(self, key, *arguments):
        write(self, key, *arguments)
        if key == "layer-00000":
            weights.rename(kept)
            shutil.copy(world.other / "dense" / "model.safetensors", weights)

    with monkeypatch.context() as patch, pytest.raises(RiaError, match=f"^{weights}: has changed .*--resume continues"):
        patch.setattr(CheckpointWriter, "write", saved_again)
        run_compress(place, out)
    names = {path.stem for path in tmp_path.glob("out.partial/units/*")}
    assert "layer-00000" in names and "layer-00001" not in names and not out.exists()
    with pytest.raises(RiaError, match="another state of the model"):
        run_compress(place, out, Settings(resume=True))
    kept.rename(weights)
    assert run_compress(place, out, Settings(resume=True)) == whole


def test_a_model_on_the_hub_is_one_commit_whatever_is_pushed_meanwhile(place, world, monkeypatch):
    commits = iter([place / "dense", *[world.other / "dense"] * 9])
    monkeypatch.setattr("ria_vllm.offline.model.run.hf.from_hub", lambda name: next(commits))
    words = ["--eval-data", str(place / "text.txt"), "--seq-len", "64", "--eval-tokens", "200", "--json"]
    found = [
        json.loads(CliRunner().invoke(evaluate, [model, *words], catch_exceptions=False).stdout)["perplexity"]
        for model in ("user/model", str(place / "dense"))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "file",
    ["folder/permutations.safetensors", "dense/tokenizer.json", "held_out.txt"],
)
def test_what_changes_in_training_is_noticed_when_a_state_is_saved(file, place, tmp_path, monkeypatch):
    step, numbers = Training._step, []

    def changing(self, number):
        numbers.append(number)
        if number == 0:
            touch(place / file)
        return step(self, number)

    monkeypatch.setattr(Training, "_step", changing)
    with pytest.raises(RiaError, match=f"^{place / file}: has changed .*The text and the steps so far are kept"):
        run_distill(place, tmp_path / "out", settings=DistillSettings(save_every=0))
    assert numbers == [0] and not (tmp_path / "out").exists()

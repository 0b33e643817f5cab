"""compress --distill."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from compressing import digests

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.commands import compress
from ria_vllm.offline.distill.command import distill


def run(model, out, text, *options: str) -> None:
    fixed = ["--calibration", str(text), "--samples", "4", "--seq-len", "32", "--reconstruct", "none"]
    CliRunner().invoke(compress, [str(model), "-o", str(out), *fixed, *options], catch_exceptions=False)


def test_what_was_pruned_is_trained_and_only_the_result_stays(tiny, text, tmp_path, monkeypatch):
    run(tiny("llama"), tmp_path / "pruned", text)
    # The text was tokenized already, in the check before pruning.
    monkeypatch.setattr("ria_vllm.offline.distill.run.training_text", lambda *_: 1 / 0)
    run(tiny("llama"), tmp_path / "out", text, "--distill", "512")
    before, after = Reader(tmp_path / "pruned"), Reader(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pruned"]
    (story,) = after.schema.recipe["distill"]
    assert story["tokens"] == 512 and story["text"] == text.name and story["micro_batch"] == 2
    for name in before.sparse_names:
        one, other = before.linear(name), after.linear(name)
        assert (one.parts["bitmask"] == other.parts["bitmask"]).all()
        assert not (one.parts["compressed"] == other.parts["compressed"]).all()


@pytest.mark.parametrize(
    ("both", "pruning", "training"),
    [
        ((), ("--rotate", "heads"), ()),
        (("--self-written", "0.25"), (), ()),
        (("--calibration", "self", "--seed", "3"), ("--weights", "int4"), ()),
        (("--compute-dtype", "float32", "--seq-len", "256"), ("--weights", "int8", "--activations", "int8"),
         ("--eval-text",)),
    ],
    ids=str,
)  # fmt: skip
def test_it_writes_what_the_two_commands_write(both, pruning, training, make_model, text, tmp_path):
    """With the same options, byte by byte, the recipe and the report included. The model reads 128 tokens."""
    model, training = make_model(tmp_path / "in", "llama", dtype=torch.bfloat16), [*training, *[text] * len(training)]
    run(model, tmp_path / "whole", text, *both, *pruning, *map(str, training), "--distill", "512")
    run(model, tmp_path / "pruned", text, *both, *pruning)
    folders = [tmp_path / "pruned", "--teacher", model, "-o", tmp_path / "out"]
    options = ["--tokens", 512, "--seq-len", 32, "--calibration", text, *both, *training]
    CliRunner().invoke(distill, [*map(str, folders + options)], catch_exceptions=False)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("step", ["run.located", "train.Training._step"])
def test_interrupted_after_pruning_it_does_not_prune_again(step, tiny, text, tmp_path, monkeypatch):
    """Nor does it read the text again if training had begun."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(tiny("llama"), whole, text, "--distill", "512")
    with monkeypatch.context() as patch:
        patch.setattr(f"ria_vllm.offline.distill.{step}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny("llama"), out, text, "--distill", "512")
    monkeypatch.setattr("ria_vllm.offline.run.compress.compress", lambda *_: 1 / 0)
    if step == "train.Training._step":
        monkeypatch.setattr("ria_vllm.offline.distill.text.training_windows", lambda *_: 1 / 0)
        monkeypatch.setattr("ria_vllm.offline.digests.of_text", lambda *_: 1 / 0)
    with pytest.raises(RiaError, match="another exponent"):
        run(tiny("llama"), out, text, "--distill", "512", "--resume", "--exponent", "1")
    run(tiny("llama"), out, text, "--distill", "512", "--resume")
    assert digests(out) == digests(whole)


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume",)], ids=str)
def test_a_folder_that_is_not_ours_is_not_touched(options, tiny, text, tmp_path):
    mine = tmp_path / "out.pruned" / "model" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(RiaError, match="out.pruned: needed for the pruned model, but it holds something else"):
        run(tiny("llama"), tmp_path / "out", text, "--distill", "512", *options)
    assert mine.read_text() == "years of work" and [path.name for path in tmp_path.iterdir()] == ["out.pruned"]


@pytest.mark.parametrize("changed", ["weights", "text", "compute_dtype"])
def test_what_was_pruned_from_something_else_is_not_resumed(changed, tiny, text, tmp_path, monkeypatch):
    """Though all that config.json says of it is the same."""
    model, words, out = shutil.copytree(tiny("llama"), tmp_path / "in"), tmp_path / "text.txt", tmp_path / "out"
    words.write_text(text.read_text())
    with monkeypatch.context() as patch:
        patch.setattr("ria_vllm.offline.distill.train.Training._step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, out, words, "--distill", "512")
    more = ["--compute-dtype", "float32"] if changed == "compute_dtype" else []
    if not more:
        os.utime(model / "model.safetensors" if changed == "weights" else words, (1, 1))
    with pytest.raises(RiaError, match=r"out\.pruned is from a run with(out compute-dtype| another)"):
        run(model, out, words, "--distill", "512", "--resume", *more)
    path = tmp_path / "out.pruned" / "ria_vllm_run.json"
    path.write_text(json.dumps({key: one for key, one in json.loads(path.read_text()).items() if key != "config.json"}))
    with pytest.raises(RiaError, match=r"an earlier version began .*out\.pruned and .* Leave out --resume"):
        run(model, out, words, "--distill", "512", "--resume")


def test_it_trains_in_the_dtype_that_is_asked_for(make_model, text, tmp_path):
    model = make_model(tmp_path / "in", "llama", dtype=torch.bfloat16)
    run(model, tmp_path / "out", text, "--distill", "512", "--compute-dtype", "float32")
    (story,) = Reader(tmp_path / "out").schema.recipe["distill"]
    assert story["compute_dtype"] == "float32"


def test_what_is_pruned_in_float16_is_trained_in_float32(make_model, text, tmp_path):
    model = make_model(tmp_path / "in", "llama", dtype=torch.float16)
    run(model, tmp_path / "out", text, "--distill", "512", "--compute-dtype", "float16")
    recipe = Reader(tmp_path / "out").schema.recipe
    assert recipe["compute_dtype"] == "float16" and recipe["distill"][0]["compute_dtype"] == "float32"


def test_the_best_step_on_held_out_text_is_kept(tiny, text, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text())
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr("ria_vllm.offline.distill.train.Training._loss_of", lambda *_: next(losses))
    more = ("--distill", "512", "--eval-text", str(text), "--eval-text", str(other))
    run(tiny("llama"), tmp_path / "out", text, *more)
    after = Reader(tmp_path / "out")
    (story,) = after.schema.recipe["distill"]
    assert story["eval_text"] == [text.name, "other.txt"] and story["steps"] == 4 and story["kept_step"] == 1
    assert set(after.report()["distill"][0]["curve"][1]["held_out"]) == {text.name, "other.txt"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--distill", "512", "--eval-text", "{model}/short.txt"), "short.txt: 2 tokens are too few to measure on"),
        (("--distill", "512", *2 * ("--eval-text", "{model}/short.txt")), "two files are called short.txt"),
        (("--eval-text", "{model}/short.txt"), "give both"),
        (("--distill", "10000000"), "--distill asks for 312500. .* smaller --distill or --seq-len"),
        (("--distill", "63"), "--distill 63: a single step takes 64 tokens"),
        (("--distill", "512", "-o", "{model}"), "this is the folder being read"),
        (("--distill", "512", "-o", ".", "--calibration", "self"), "'.' cannot be replaced by a new folder"),
    ],
)
def test_what_training_would_refuse_is_refused_before_pruning(options, why, tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr("ria_vllm.offline.run.compress.compress", lambda *_: 1 / 0)
    model = shutil.copytree(tiny("llama"), tmp_path / "in")
    (model / "short.txt").write_text("it")
    with pytest.raises(RiaError, match=why):
        run(model, tmp_path / "out", text, *(one.format(model=model) for one in options), "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_experts_are_pruned_and_trained(tiny, text, tmp_path):
    run(tiny("qwen3-moe"), tmp_path / "pruned", text)
    run(tiny("qwen3-moe"), tmp_path / "out", text, "--distill", "512")
    before, after = Reader(tmp_path / "pruned"), Reader(tmp_path / "out")
    assert after.schema.experts == before.schema.experts and set(after.files) == set(before.files)
    for name in before.sparse_names:
        one, other = before.linear(name), after.linear(name)
        assert torch.equal(one.parts["bitmask"], other.parts["bitmask"])
        assert not torch.equal(one.parts["compressed"], other.parts["compressed"])


def test_several_processes_and_gguf_files_are_refused(tiny, text, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(RiaError, match="the teacher must be a Hugging Face folder or hub id"):
        run(file, tmp_path / "out", text, "--distill", "512")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RiaError, match="Compress first, then start `ria-vllm distill` with torchrun"):
        run(tiny("llama"), tmp_path / "out", text, "--distill", "512")
    assert list(tmp_path.iterdir()) == [file]


def test_other_patterns_are_refused(tiny, text, tmp_path):
    with pytest.raises(RiaError, match="--distill is for the pattern 2:4"):
        run(tiny("llama"), tmp_path / "out", text, "--distill", "512", "--pattern", "4:8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--weights", "int4"), ("--weights", "int4", "--group-size", "32"),
                                     ("--weights", "int8", "--activations", "int8")], ids=" ".join)  # fmt: skip
def test_integers_and_their_scales_are_trained(options, tiny, text, tmp_path):
    run(tiny("llama"), tmp_path / "pruned", text, *options)
    run(tiny("llama"), tmp_path / "out", text, *options, "--distill", "512")
    before, after = Reader(tmp_path / "pruned"), Reader(tmp_path / "out")
    assert after.schema.weight_format == before.schema.weight_format
    assert after.schema.input_activations == before.schema.input_activations
    for name in before.sparse_names:
        one, other = before.linear(name), after.linear(name)
        assert torch.equal(one.parts["bitmask"], other.parts["bitmask"])
        assert not torch.equal(one.parts["weight_scale"], other.parts["weight_scale"])
    errors = [key for record in after.report()["linears"].values() for key in record if key.startswith("error")]
    assert not errors

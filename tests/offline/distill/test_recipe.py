"""The options of a distillation."""

import math

import pytest
from click.testing import CliRunner

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.command import distill
from ria_vllm.offline.distill.recipe import Distillation


def test_steps_and_their_learning_rates():
    recipe = Distillation(tokens=10_000, seq_len=100, batch=4, passes=2, lr=0.1, warmup=0.1)
    assert recipe.windows == 100 and recipe.steps == 50
    rates = [recipe.rate(step) for step in range(50)]
    assert rates[0] == pytest.approx(0.1 / 5) and max(rates) == rates[4]
    assert rates[25] == pytest.approx(0.05) and rates[49] == pytest.approx(0.05 * (1 + math.cos(math.pi * 49 / 50)))
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_all_options_are_dumped_without_local_paths():
    recipe = Distillation(tokens=2048, text="/mine/a.txt", eval_text=("/mine/b.txt",))
    found = recipe.dump("/mine/model")
    assert list(found) == [
        "teacher", "tokens", "text", "self_written", "seq_len", "batch", "micro_batch", "passes", "lr", "warmup",
        "weight_decay", "clip", "text_loss", "eval_text", "eval_tokens", "evals", "patience", "compute_dtype", "seed",
        "versions",
    ]  # fmt: skip
    assert (found["teacher"], found["text"], found["eval_text"]) == ("model", "a.txt", ["b.txt"])


@pytest.mark.parametrize("steps, evals", [(50, 10), (7, 3), (3, 10)])
def test_it_is_measured_as_often_as_asked_and_after_the_last_step(steps, evals):
    recipe = Distillation(tokens=steps * 20, seq_len=10, batch=2, evals=evals)
    measured = [step for step in range(1, steps + 1) if recipe.measured_after(step)]
    assert recipe.steps == steps and len(measured) == min(steps, evals) and measured[-1] == steps


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 100}, "a single step takes 1024"),
        ({"lr": math.nan}, "--lr nan"),
        ({"lr": -1.0}, "--lr -1"),
        ({"text": "a.txt", "self_written": 1.0}, "--self-written 1.0"),
        ({"text": "a.txt", "self_written": math.nan}, "--self-written nan"),
        ({"text": "a.txt", "self_written": 0.02}, "--self-written 0.02: of 19 sequences, that is none"),
        ({"self_written": 0.5}, "--calibration self: .* leave out --self-written"),
        ({"micro_batch": 0}, "--micro-batch 0"),
        ({"patience": 0}, "--patience 0"),
        ({"compute_dtype": "float16"}, "--compute-dtype float16: .*'float32'"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(RiaError, match=message):
        Distillation(**{"tokens": 10_000} | options)


@pytest.mark.parametrize(
    ("batch", "given", "processes", "found"), [(8, None, 1, 8), (8, None, 4, 2), (8, 1, 4, 1), (8, 2, 2, 2)]
)
def test_a_micro_batch_is_all_that_a_process_has_of_a_step(batch, given, processes, found):
    recipe = Distillation(tokens=10_000, batch=batch, micro_batch=given)
    assert recipe.among(processes).micro_batch == found


@pytest.mark.parametrize(
    ("batch", "given", "processes", "multiple"), [(8, None, 3, 3), (2, None, 3, 3), (8, 4, 4, 16), (3, 2, 1, 2)]
)
def test_steps_that_processes_cannot_share_are_refused(batch, given, processes, multiple):
    """What the error asks for can be shared."""
    recipe = Distillation(tokens=10_000, batch=batch, micro_batch=given)
    message = f"cannot be divided evenly among {processes} processes. Give a multiple of {multiple} as --batch"
    with pytest.raises(RiaError, match=message):
        recipe.among(processes)
    assert Distillation(tokens=10_000, batch=multiple, micro_batch=given).among(processes)


@pytest.mark.parametrize("options", [("--patience", "3"), ("--evals", "4"), ("--eval-tokens", "512")], ids=" ".join)
def test_options_for_held_out_text_need_one(options, tmp_path):
    """Whoever asks for patience expects training to stop by itself."""
    folders = [str(tmp_path), "--teacher", str(tmp_path), "-o", str(tmp_path / "out"), "--tokens", "2048"]
    with pytest.raises(RiaError, match=f"^{options[0]} is about held-out text.*Give --eval-text, too"):
        CliRunner().invoke(distill, [*folders, *options], catch_exceptions=False)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(RiaError, match="config.json"):  # there is no model
        held_out = ["--eval-text", str(tmp_path / "text.txt")]
        CliRunner().invoke(distill, [*folders, *options, *held_out], catch_exceptions=False)

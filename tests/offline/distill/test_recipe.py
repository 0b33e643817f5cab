"""The options of a distillation."""

import math

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.recipe import Distillation


def test_steps_and_their_learning_rates():
    recipe = Distillation(tokens=10_000, seq_len=25, batch=4, lr=0.1)
    assert recipe.windows == 400 and recipe.steps == 100
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1 / 5) and max(rates) == rates[4]
    assert rates[50] == pytest.approx(0.05) and rates[99] == pytest.approx(0.05 * (1 + math.cos(math.pi * 99 / 100)))
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_all_options_are_dumped_without_local_paths():
    recipe = Distillation(tokens=2048, text="/mine/a.txt", eval_text=("/mine/b.txt",))
    found = recipe.dump("/mine/model")
    assert list(found) == [
        "teacher", "tokens", "text", "self_written", "seq_len", "batch", "lr", "eval_text", "eval_tokens", "evals",
        "compute_dtype", "seed", "versions",
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
        ({"text": "a.txt", "self_written": 1.0}, "--self-written 1.0"),
        ({"text": "a.txt", "self_written": math.nan}, "--self-written nan"),
        ({"text": "a.txt", "self_written": 0.02}, "--self-written 0.02: of 19 sequences, that is none"),
        ({"self_written": 0.5}, "--data self: .* leave out --self-written"),
        ({"compute_dtype": "float16"}, "--compute-dtype float16: .*'float32'"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(RiaError, match=message):
        Distillation(**{"tokens": 10_000} | options)

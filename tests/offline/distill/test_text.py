"""Windows of text and their order."""

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration import data
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.text import batch_of, check_vocabulary, held_out_windows, training_windows
from ria_vllm.offline.model.hf import load_tokenizer


def test_each_pass_reads_every_window_once_in_another_order():
    recipe = Distillation(tokens=120, seq_len=10, batch=4, micro_batch=2, passes=3)
    order = [n for step in range(recipe.steps) for micro in range(2) for n in batch_of(recipe, step, micro)]
    passes = [order[:12], order[12:24], order[24:]]
    assert passes[0] == list(range(12)) and all(sorted(one) == passes[0] for one in passes)
    assert passes[1] != passes[0] and passes[2] not in passes[:2]


def test_training_windows_are_parts_of_the_text(tiny, text):
    tokenizer = load_tokenizer(str(tiny("llama")))
    windows = training_windows(Distillation(tokens=640, seq_len=32, batch=2, text=str(text)), tokenizer)
    assert windows.shape == (20, 32) and windows.dtype == torch.int32
    content = text.read_text()
    assert all(tokenizer.decode(window) in content for window in windows)
    assert len({tuple(window.tolist()) for window in windows}) == 20


def test_the_windows_are_not_those_that_the_model_was_calibrated_on(tiny, text):
    """With the same text and seed. Two draws of 10 from 100 have 10 windows in common with a chance of 6e-14."""
    tokenizer = load_tokenizer(str(tiny("llama")))
    width = len(tokenizer(text.read_text()).input_ids) // 100
    calibration = data.from_text(str(text), tokenizer, 10, width, 0)
    windows = training_windows(Distillation(tokens=10 * width, seq_len=width, batch=2, text=str(text)), tokenizer)
    assert sum(bool((calibration == window).all(1).any()) for window in windows) < 8


def test_held_out_windows_follow_each_other_from_the_start(tiny, text):
    tokenizer = load_tokenizer(str(tiny("llama")))
    windows = held_out_windows(str(text), tokenizer, 200, 64)
    assert windows.shape == (3, 64)
    assert windows.flatten().tolist() == tokenizer(text.read_text()).input_ids[:192]


def test_too_short_a_held_out_text_is_refused(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(RiaError, match=r"short\.txt: 5 tokens are less than a window of 64"):
        held_out_windows(str(tmp_path / "short.txt"), load_tokenizer(str(tiny("llama"))), 200, 64)


def test_a_token_that_the_model_does_not_know_is_refused():
    with pytest.raises(RiaError, match="token 300, but the model knows only 258"):
        check_vocabulary([torch.tensor([1, 2]), torch.tensor([300])], 258, "model")

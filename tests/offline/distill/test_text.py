"""Windows of text and their order."""

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.text import held_out_texts, held_out_windows, training_text
from ria_vllm.offline.model.run.hf import load_tokenizer
from ria_vllm.offline.self_written import check_vocabulary, written_of
from ria_vllm.progress import Monitor


def drawn(recipe: Distillation, tokenizer) -> torch.Tensor:
    return training_text(recipe, tokenizer, Monitor(shown=False))[0]


def test_training_windows_are_parts_of_the_text(tiny, text):
    tokenizer = load_tokenizer(str(tiny("llama")))
    windows = drawn(Distillation(tokens=640, seq_len=32, batch=2, text=str(text)), tokenizer)
    assert windows.shape == (20, 32) and windows.dtype == torch.int32
    content = text.read_text()
    assert all(tokenizer.decode(window) in content for window in windows)
    assert len({tuple(window.tolist()) for window in windows}) == 20


def test_held_out_windows_follow_each_other_from_the_start(tiny, text):
    tokenizer = load_tokenizer(str(tiny("llama")))
    windows = held_out_windows(str(text), tokenizer, 200, 64)
    assert windows.shape == (3, 64)
    assert windows.flatten().tolist() == tokenizer(text.read_text()).input_ids[:192]


def test_held_out_text_in_another_format_is_refused(tmp_path):
    """Braces, quotes and names of fields would be measured with it."""
    path = tmp_path / "chats.JSONL"
    path.write_text('{"text": "abcdefg"}\n' * 200)
    with pytest.raises(RiaError, match=f"--eval-data {path}: would be read as it is.* in a .txt file"):
        held_out_windows(str(path), lambda content, verbose: {"input_ids": [*content.encode()]}, 8192, 1024)


def test_a_text_shorter_than_a_window_is_refused(tiny, tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("abcdefg" * 100)
    tokenizer = load_tokenizer(str(tiny("llama")))
    with pytest.raises(RiaError, match="700 tokens are too few.*or `distill` a smaller --eval-tokens"):
        held_out_texts(Distillation(tokens=1024, eval_text=(str(path),)), tokenizer, 4096)
    (windows,) = held_out_texts(Distillation(tokens=1024, eval_text=(str(path),)), tokenizer, 256).values()
    assert windows.shape == (2, 256)


def test_a_token_that_the_model_does_not_know_is_refused():
    with pytest.raises(RiaError, match="token 300, but the model knows only 258"):
        check_vocabulary([torch.tensor([1, 2]), torch.tensor([300])], 258, "model")


@pytest.mark.parametrize(("share", "written"), [(0.5, 10), (0.99, 19)])
def test_a_share_of_the_windows_is_left_to_the_teacher(share, written, tiny, text):
    tokenizer = load_tokenizer(str(tiny("llama")))
    recipe = Distillation(tokens=640, seq_len=32, batch=2, text=str(text), self_written=share)
    assert written_of(recipe.windows, share) == written and len(drawn(recipe, tokenizer)) == 20 - written

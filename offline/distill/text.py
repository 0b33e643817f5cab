"""The text that a student is trained and measured on, as windows of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.writer import check_place
from ria_vllm.errors import RiaError
from ria_vllm.files.text_file import read_text
from ria_vllm.offline import digests
from ria_vllm.offline.calibration import data, hub
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.hf import read_config
from ria_vllm.offline.self_written import written_of
from ria_vllm.progress import Monitor

# The most tokens in a window of held-out text.
HELD_OUT_WINDOW = 1024


def training_text(recipe: Distillation, tokenizer: Any, monitor: Monitor) -> tuple[torch.Tensor, dict[str, str]]:
    """Windows of the text, packed without padding, drawn and ordered by the seed.

    Those that the teacher writes beside it are not among them.

    Returns:
        int32 [windows, seq_len]; and for the recipe what they are from (`digests.of_text`), while it is still what was
        read.

    Raises:
        RiaError: no such text, or too little of it.
    """
    count = recipe.windows - written_of(recipe.windows, recipe.self_written)
    with monitor.phase("reading the text"):
        text = hub.opened(recipe.text)
        windows = data.from_text(text, tokenizer, count, recipe.seq_len, recipe.seed)
    with monitor.phase("digests of files"):
        return windows, digests.of_text(text, "text")


def held_out_texts(recipe: Distillation, tokenizer: Any, longest: int | None) -> dict[str, torch.Tensor]:
    """The windows of each `--eval-data`, by the file's name.

    Args:
        longest: how many tokens the models can read; None: that is not known.

    Raises:
        RiaError: see `held_out_windows`.
    """
    length = min(HELD_OUT_WINDOW, longest or HELD_OUT_WINDOW, recipe.eval_tokens)
    return {Path(text).name: held_out_windows(text, tokenizer, recipe.eval_tokens, length) for text in recipe.eval_text}


def held_out_windows(path: str, tokenizer: Any, tokens: int, seq_len: int) -> torch.Tensor:
    """The first windows of a text: int64 [windows, seq_len], at most `tokens` in all. They follow each other.

    Raises:
        RiaError: the text cannot be read, is not plain text, or is shorter than a window.
    """
    if Path(path).suffix.lower() == ".jsonl":
        raise RiaError(
            f"--eval-data {path}: would be read as it is, with what the file format adds to the text. Give the text "
            "alone, in a .txt file."
        )
    # A token is rarely longer than this many characters on average, and a long text is not tokenized in vain.
    content = read_text(Path(path), "--eval-data")[: tokens * 16]
    found = torch.tensor(tokenizer(content, verbose=False)["input_ids"][:tokens], dtype=torch.int64)
    if len(found) < seq_len:
        raise RiaError(
            f"--eval-data {path}: {len(found)} tokens are too few to measure on. Give more, or `distill` a smaller "
            "--eval-tokens."
        )
    count = len(found) // seq_len
    return found[: count * seq_len].view(count, seq_len)


def same_tokens(one: Any, other: Any, names: tuple[Path | str, Path | str]) -> None:
    """Check that two tokenizers have the same tokens: otherwise predictions cannot be compared. Special tokens may be
    known to one of them only."""
    special = set(one.all_special_tokens) ^ set(other.all_special_tokens)
    mine, theirs = ({t: i for t, i in each.get_vocab().items() if t not in special} for each in (one, other))
    if mine != theirs:
        raise RiaError(
            f"{names[1]}: has other tokens than {names[0]}. Give the model that it was pruned from as --teacher."
        )


def context_of(folders: Sequence[str]) -> int | None:
    """How many tokens all of these models can read; None if none of them says."""
    found = [getattr(text_config(read_config(name)), "max_position_embeddings", None) for name in folders]
    return min((one for one in found if one), default=None)


def check_texts(out: Path, recipe: Distillation, monitor: Monitor) -> None:
    """Refuse texts that --overwrite would delete, and held-out ones that the report could not tell apart; warn of a
    held-out text that is trained on.

    Raises:
        RiaError: see above.
    """
    training, held_out = Path(recipe.text), list(map(Path, recipe.eval_text))
    files = [path for path in (training, *held_out) if path.is_file()]
    for path in files:
        check_place(out, path)
    names = [path.name for path in held_out]
    for name in names:
        if names.count(name) > 1:
            raise RiaError(f"--eval-data: two files are called {name}, but the report names texts so. Rename one.")
    for path in held_out:
        if training in files and digests.sha256(training) == digests.sha256(path):
            monitor.warn(
                f"--eval-data {path}: this text is trained on, too, so the perplexity and the divergence measured on "
                "it say little about other text, and the step that is kept may not be the best. Give another text."
            )

"""Calibration tokens from a text file or a data set of the Hugging Face hub.

Files are read without the loaders of `datasets`: its JSON loader turns dates into timestamps and names no line in its
errors, and its text loader cuts texts into lines.
"""

import json
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError, printable
from ria_vllm.offline.calibration import hub
from ria_vllm.offline.calibration.hub import HubText
from ria_vllm.offline.model.run.hf import first_line

TEXT_COLUMN = "text"
MESSAGES_COLUMN = "messages"
# A text file is tokenized in chunks of about this many characters, so that large files need little memory.
CHUNK_CHARACTERS = 1 << 20
# Reading stops at this multiple of the tokens asked for, or so many beyond them. The samples are drawn from what has
# been read.
OVERSAMPLING, MOST_BEYOND = 8, 1 << 24


def from_text(source: str | HubText, tokenizer: Any, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Samples drawn from a text: windows that do not overlap, chosen and ordered by the seed.

    If the tokenizer starts every prompt with special tokens (such as BOS), so does each sample.

    Args:
        source: path of a text or JSON Lines file, or an opened data set.
        samples: number of samples.
        seq_len: tokens in a sample, special tokens included.

    Returns:
        int32 [samples, seq_len]. Besides them, the tokens that are read are in memory, in 4 bytes each.

    Raises:
        RiaError: the text does not exist, cannot be read, or is too short.
    """
    start = _prompt_start(tokenizer)
    width = seq_len - len(start)
    if width < 1:
        raise RiaError(f"--seq-len {seq_len} is too short: the tokenizer alone puts {len(start)} tokens before a text.")
    tokens = array("i")
    for text in documents(source, tokenizer):
        tokens.extend(tokenizer(text, add_special_tokens=False).input_ids)
        if len(tokens) >= min(samples * width * OVERSAMPLING, samples * width + MOST_BEYOND):
            break
    windows = len(tokens) // width
    if windows < samples:
        name = source.name if isinstance(source, HubText) else source
        raise RiaError(
            f"{name}: too little text: {len(tokens)} tokens make {windows} samples of {seq_len}, but {samples}, "
            "held-out ones included, are needed. Give more text, or ask for fewer or shorter samples."
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    read = torch.frombuffer(tokens, dtype=torch.int32, count=windows * width).view(windows, width)
    found = torch.empty(samples, seq_len, dtype=torch.int32)
    found[:, : len(start)] = torch.tensor(start, dtype=torch.int32)
    for first in range(0, samples, 1024):  # so few at a time are in memory twice
        found[first : first + 1024, len(start) :] = read[chosen[first : first + 1024]]
    return found


def documents(source: str | HubText, tokenizer: Any = None) -> Iterator[str]:
    """The texts of a file or data set, in order.

    They are chunks of a text file, documents, each with an empty line after it, or conversations, which have what the
    chat template puts after them. A row with a text and messages is read as the text.

    Args:
        tokenizer: its chat template makes a text of the messages, and of the tools, in a row of a JSON Lines file.

    Raises:
        RiaError: the source does not exist or holds something else; names the line of a JSON Lines file.
    """
    if isinstance(source, HubText):
        for row in source.rows:
            yield from _document(row[TEXT_COLUMN], f"--data {source.name}")
        return
    path = Path(source)
    if not path.is_file():
        names = ", ".join(hub.DATASETS)
        raise RiaError(f"--data {source}: no such file. Give self, a .txt or .jsonl file, or one of {names}.")
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": _plain, ".jsonl": partial(_json_lines, tokenizer=tokenizer),
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise RiaError(
            f"--data {source}: unknown file type. Give .txt or .jsonl; `datasets` writes the latter with to_json()."
        )
    try:
        yield from readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError) as error:
        raise RiaError(f"{source}: cannot be read ({error}).") from None


def _prompt_start(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before every prompt, whatever it adds after it."""
    with_text = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    starts = range(len(with_text) - len(plain), -1, -1)
    return with_text[: next((at for at in starts if with_text[at : at + len(plain)] == plain), 0)]


def _plain(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        # Chunks end at the end of a line, so that no word is cut.
        while chunk := "".join(file.readlines(CHUNK_CHARACTERS)):
            yield chunk


def _json_lines(path: Path, tokenizer: Any) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:  # some programs begin a file with a mark, which is no JSON
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
                text, messages = row.get(TEXT_COLUMN), row.get(MESSAGES_COLUMN)
            except (ValueError, AttributeError, RecursionError):
                raise RiaError(f"{place}: no JSON object.") from None
            if text is None and messages is not None:
                yield _clean(_conversation(messages, row.get("tools"), tokenizer, place))
            elif TEXT_COLUMN in row:
                yield from _document(text, place)
            else:
                raise RiaError(f"{place}: no field {TEXT_COLUMN!r} or {MESSAGES_COLUMN!r}.")


def _conversation(messages: Any, tools: Any, tokenizer: Any, place: str) -> str:
    """What the model's chat template makes of a conversation.

    Args:
        messages: untrusted; should be a list of {"role", "content"}.

    Raises:
        RiaError: the model has no template, it refuses the messages, or a content is no text, which it would print.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise RiaError(f"{place}: the model has no chat template to turn messages into text. Give a field 'text'.")
    try:
        texts = all(isinstance(m.get("role"), str) and isinstance(m.get("content") or "", str) for m in messages)
        found = str(tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)) if texts else None
    except Exception as error:  # a template is untrusted, and may raise anything
        reason = printable(first_line(error))
        raise RiaError(f"{place}: the model's chat template refuses these messages ({reason}).") from None
    if found is None:
        raise RiaError(f"{place}: role and content of each message must be strings. Give strings, or a field 'text'.")
    # A template may leave out thoughts, but not the last words.
    said = [message["content"].rpartition("</think>")[2].strip() for message in messages if message.get("content")]
    if said and said[-1] not in found:
        raise RiaError(
            f"{place}: the model's chat template leaves out what these messages say. Leave the row out, or give a "
            "field 'text'."
        )
    return found


def _document(text: Any, place: str) -> Iterator[str]:
    """The text and an empty line after it; nothing for a null."""
    if text is None:
        return
    if not isinstance(text, str):
        raise RiaError(f"{place}: the field {TEXT_COLUMN!r} must be a string, not {type(text).__name__}.")
    yield _clean(text) + "\n\n"


def _clean(text: str) -> str:
    # JSON can spell half of a surrogate pair, which is not a character; tokenizers refuse it.
    return text.encode(errors="replace").decode()

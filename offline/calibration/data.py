"""Calibration tokens: from a text file, a data set of the Hugging Face hub, or the dense model itself.

Files are read without the loaders of `datasets`: its JSON loader turns dates into timestamps and names no line in its
errors, and its text loader cuts texts into lines.
"""

import json
from array import array
from collections.abc import Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError, printable
from ria_vllm.offline.calibration import hub
from ria_vllm.offline.calibration.hub import HubText
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.hf import first_line
from ria_vllm.progress import Monitor

TEXT_COLUMN = "text"
MESSAGES_COLUMN = "messages"
# A text file is tokenized in chunks of about this many characters, so that large files need little memory.
CHUNK_CHARACTERS = 1 << 20
# Reading stops at this multiple of the tokens asked for, or so many beyond them. The samples are drawn from what has
# been read.
OVERSAMPLING, MOST_BEYOND = 8, 1 << 24
# The model writes documents of this length. In longer ones attention would dominate the cost.
DOCUMENT_TOKENS = 256
# Documents are generated in batches whose KV cache has about this size.
KV_CACHE_BYTES = 1 << 30
LEAST_BATCH, MOST_BATCH = 8, 256
# Under which name a forward pass returns what it keeps of the tokens it has read, and takes it: attention and hybrids,
# Mamba, RWKV.
CACHES = ("past_key_values", "cache_params", "state")


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
            f"{name}: too little text: {len(tokens)} tokens make {windows} samples of {seq_len}, but {samples} are "
            "needed. Give more text, or ask for fewer or shorter samples."
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
            yield from _document(row[TEXT_COLUMN], f"--calibration {source.name}")
        return
    path = Path(source)
    if not path.is_file():
        names = ", ".join(hub.DATASETS)
        raise RiaError(f"--calibration {source}: no such file. Give self, a .txt or .jsonl file, or one of {names}.")
    readers = {".txt": _plain, ".jsonl": partial(_json_lines, tokenizer=tokenizer)}
    if path.suffix.lower() not in readers:
        raise RiaError(
            f"--calibration {source}: unknown file type. Give .txt or .jsonl; `datasets` writes the latter with "
            "to_json()."
        )
    try:
        yield from readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError) as error:
        raise RiaError(f"--calibration {source}: cannot be read ({error}).") from None


def from_model(model: Any, bos: int | None, samples: int, seq_len: int, seed: int, monitor: Monitor) -> torch.Tensor:
    """Samples that the dense model generates itself, at temperature 1 from a random first token.

    A sample is a sequence of documents of DOCUMENT_TOKENS tokens, the last one cut. Generation does not stop at an
    end-of-text token: there the model starts another text, as it was trained to.

    Args:
        model: a complete causal LM of transformers.
        bos: the token that starts every text, or None if the model has none.
        samples: number of samples.
        seq_len: tokens in a sample.

    Returns:
        int64 [samples, seq_len], on the CPU.

    Raises:
        RiaError: the model predicts NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    per_sample = -(-seq_len // DOCUMENT_TOKENS)
    length = min(seq_len, DOCUMENT_TOKENS)
    count = samples * per_sample
    batch_size = _batch_size(model, length)
    batches = [min(batch_size, count - first) for first in range(0, count, batch_size)]
    steps = iter(monitor.steps(range(len(batches) * length), "sampling the model", len(batches) * length))
    generated = [_generate(model, bos, batch, length, generator, steps) for batch in batches]
    next(steps, None)
    return torch.cat(generated).view(samples, per_sample * length)[:, :seq_len].contiguous()


def _batch_size(model: Any, length: int) -> int:
    """Documents of `length` tokens whose KV cache takes KV_CACHE_BYTES, within LEAST_BATCH and MOST_BATCH.

    LEAST_BATCH without attention: the states of recurrent layers are large, and have another size in each model.
    """
    config = text_config(model.config)
    # Layers may differ in it (Gemma 4).
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    bytes_per_token = sum(map(_channels, layers)) * 2 * model.dtype.itemsize
    if not bytes_per_token:
        return LEAST_BATCH
    return max(LEAST_BATCH, min(MOST_BATCH, KV_CACHE_BYTES // (bytes_per_token * length)))


def _channels(config: Any) -> int:
    """Those of the keys of one layer; 0 if it has no attention."""
    num_attention_heads = getattr(config, "num_attention_heads", None)
    if not num_attention_heads:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // num_attention_heads)


def _generate(
    model: Any, bos: int | None, batch: int, length: int, generator: torch.Generator, steps: Iterator[int]
) -> torch.Tensor:
    """Documents, int64 [batch, length]; takes one of `steps` for each token.

    A model that returns no cache reads each document again for every token.
    """
    vocab_size = model.get_input_embeddings().num_embeddings
    vocab_size = min(vocab_size, getattr(text_config(model.config), "vocab_size", vocab_size))
    first = torch.randint(vocab_size, (batch, 1), generator=generator)
    tokens = first if bos is None else torch.cat([torch.full_like(first, bos), first], dim=1)
    tokens = tokens[:, :length]
    cache: dict[str, Any] = {}
    cached, use_cache = 0, True
    with_positions = _takes_positions(model)
    with torch.no_grad():
        for _ in range(tokens.shape[1]):
            next(steps)
        while tokens.shape[1] < length:
            place = torch.arange(cached, tokens.shape[1], device=model.device).expand(batch, -1)
            positions = {"position_ids": place} if with_positions else {}
            out = model(input_ids=tokens[:, cached:].to(model.device), use_cache=use_cache, **positions, **cache)
            cache = {name: out[name] for name in CACHES if out.get(name) is not None}
            cached, use_cache = (tokens.shape[1], True) if cache else (0, False)
            probabilities = out.logits[:, -1].float().softmax(-1).cpu()
            if not bool(probabilities.isfinite().all()):
                raise RiaError("The dense model itself predicts NaN. Check that it works without pruning.")
            # Inverse transform sampling: torch.multinomial would draw a random number for every entry.
            cumulative = probabilities.cumsum(-1)
            point = torch.rand(batch, 1, generator=generator) * cumulative[:, -1:]
            following = torch.searchsorted(cumulative, point, right=True).clamp(max=probabilities.shape[1] - 1)
            tokens = torch.cat([tokens, following], dim=1)
            next(steps)
    return tokens


def _takes_positions(model: Any) -> bool:
    """Whether a model is to be told the positions of the tokens that it reads, as transformers' `generate` tells it.

    Bamba counts them from the first one that is not in the cache. Models that read images, which count in several
    directions, find out by themselves.
    """
    return text_config(model.config) is model.config and "position_ids" in signature(model.forward).parameters


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
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
                text, messages = row.get(TEXT_COLUMN), row.get(MESSAGES_COLUMN)
            except (ValueError, AttributeError):
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

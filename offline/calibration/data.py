"""Calibration tokens: from a text file, a data set of the hub, or the dense model itself."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor

# Hub id, configuration, and whether it is too large to be fetched whole.
DATASETS = {
    "c4": ("allenai/c4", "en", True),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", False),
    "pile": ("monology/pile-uncopyrighted", None, True),
}
FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_COLUMN = "text"
# Characters that are tokenized at a time; memory stays small on large files.
PIECE = 1 << 20
# Of a large text, so many times the tokens asked for are read, and the samples drawn from these.
SPREAD = 8
# A model is sampled for so many tokens at a time: attention to longer texts would cost more than all the rest.
DOCUMENT = 256
# Documents are written side by side, so many that their attention cache stays at this size.
CACHE_BYTES = 1 << 30


def from_text(source: str, tokenizer: Any, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Samples drawn from a text: consecutive windows without overlap, chosen and ordered by the seed.

    Where the tokenizer starts every prompt with a token of its own, each sample starts with it too.

    Args:
        source: a file, or a name in DATASETS.

    Returns:
        int64 [samples, seq_len].

    Raises:
        RiaError: no such text, or too little of it.
    """
    start = _prompt_start(tokenizer)
    width = seq_len - len(start)
    if width < 1:
        raise RiaError(f"--seq-len {seq_len}: too short, the tokenizer alone puts {len(start)} tokens before a text.")
    wanted = samples * width
    tokens: list[int] = []
    for text in documents(source):
        tokens += tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) >= wanted * SPREAD:
            break
    windows = len(tokens) // width
    if windows < samples:
        raise RiaError(
            f"{source}: too little text: {len(tokens)} tokens make {windows} samples of {seq_len}, {samples} were asked "
            f"for. Give more text, or a smaller --samples or --seq-len."
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    body = torch.tensor(tokens[: windows * width]).view(windows, width)[chosen]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(samples, -1), body], dim=1)


def documents(source: str) -> Iterator[str]:
    """Pieces of text, in order."""
    if source in DATASETS:
        yield from _hub_dataset(source)
        return
    path = Path(source)
    if not path.is_file():
        names = ", ".join(DATASETS)
        kinds = "/".join(FILE_SUFFIXES)
        raise RiaError(f"--calibration {source}: no such file. Give self, a {kinds} file, or one of {names}.")
    readers = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise RiaError(f"--calibration {source}: unknown kind of file. Give {', '.join(FILE_SUFFIXES)}.")
    try:
        yield from readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError) as error:
        raise RiaError(f"--calibration {source}: cannot be read ({error}).") from None


def from_model(
    model: Any, bos: int | None, samples: int, seq_len: int, seed: int, monitor: Monitor
) -> torch.Tensor:
    """Samples that the dense model writes itself, at temperature 1 from a random first token.

    A sample is made of documents of up to DOCUMENT tokens; past an end-of-text token the model goes on as it was
    trained to, with another text.

    Args:
        model: a whole causal LM of transformers.
        bos: the token that starts every text, if the model has one.

    Returns:
        int64 [samples, seq_len], on the CPU.

    Raises:
        RiaError: the model's predictions are NaN.
    """
    draw = torch.Generator().manual_seed(seed)
    pieces = -(-seq_len // DOCUMENT)
    length = min(seq_len, DOCUMENT)
    count = samples * pieces
    at_once = _documents_at_once(model, length)
    batches = [min(at_once, count - first) for first in range(0, count, at_once)]
    steps = iter(monitor.steps(range(len(batches) * length), "sampling the model", len(batches) * length))
    done = [_write(model, bos, batch, length, draw, steps) for batch in batches]
    next(steps, None)
    return torch.cat(done).view(samples, pieces * length)[:, :seq_len].contiguous()


def _documents_at_once(model: Any, length: int) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return max(8, min(256, CACHE_BYTES // (token * length)))


def _write(
    model: Any, bos: int | None, batch: int, length: int, draw: torch.Generator, steps: Iterator[int]
) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    vocabulary = min(vocabulary, getattr(model.config.get_text_config(), "vocab_size", vocabulary))
    first = torch.randint(vocabulary, (batch, 1), generator=draw)
    text = first if bos is None else torch.cat([torch.full_like(first, bos), first], dim=1)
    text = text[:, :length]
    cache, fed = None, 0
    with torch.no_grad():
        for _ in range(text.shape[1]):
            next(steps)
        while text.shape[1] < length:
            out = model(input_ids=text[:, fed:].to(model.device), past_key_values=cache, use_cache=True)
            cache, fed = out.past_key_values, text.shape[1]
            chances = out.logits[:, -1].float().softmax(-1).cpu()
            if not bool(chances.isfinite().all()):
                raise RiaError("NaN in the dense model's own predictions; check that it works without pruning.")
            # By the inverse of the distribution function: torch.multinomial draws a number for every entry.
            passed = chances.cumsum(-1)
            point = torch.rand(batch, 1, generator=draw) * passed[:, -1:]
            following = torch.searchsorted(passed, point, right=True).clamp(max=chances.shape[1] - 1)
            text = torch.cat([text, following], dim=1)
            next(steps)
    return text


def _prompt_start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every prompt (and does not put behind it)."""
    with_text = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    return with_text[: len(with_text) - len(plain)] if with_text[len(with_text) - len(plain) :] == plain else []


def _plain(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        # Pieces end with a line, so that no word is cut.
        while piece := "".join(file.readlines(PIECE)):
            yield piece


def _json_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[TEXT_COLUMN]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise RiaError(f"{path}, line {number}: no JSON object with a field {TEXT_COLUMN!r}.") from None
            yield from _document(text, f"{path}, line {number}")


def _document(text: Any, where: str) -> Iterator[str]:
    """The text and what ends it; nothing for a null."""
    if text is None:
        return
    if not isinstance(text, str):
        raise RiaError(f"{where}: {TEXT_COLUMN!r} holds no text but {type(text).__name__}.")
    # JSON can spell half a surrogate pair, which is no character and which no tokenizer takes.
    yield text.encode(errors="replace").decode() + "\n\n"


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if TEXT_COLUMN not in file.schema_arrow.names:
            raise RiaError(f"{path}: no column {TEXT_COLUMN!r} (it has {', '.join(file.schema_arrow.names)}).")
        for batch in file.iter_batches(batch_size=256, columns=[TEXT_COLUMN]):
            for text in batch.column(0).to_pylist():
                yield from _document(text, str(path))
    except pyarrow.ArrowException as error:
        raise RiaError(f"{path}: broken parquet file ({error}).") from None


def _hub_dataset(name: str) -> Iterable[str]:
    from datasets import load_dataset

    repository, configuration, streaming = DATASETS[name]
    try:
        rows = iter(load_dataset(repository, configuration, split="train", streaming=streaming))
        first = next(rows)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RiaError(
            f"--calibration {name}: {repository} cannot be had from the hub ({reason}). Give a text file, or self."
        ) from None
    for row in itertools.chain([first], rows):
        yield from _document(row[TEXT_COLUMN], f"--calibration {name}")

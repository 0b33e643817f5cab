"""Text that the dense model writes itself: any text, or answers to prompts."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from inspect import signature
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.progress import Monitor

# The model writes documents of this length. In longer ones attention would dominate the cost.
DOCUMENT_TOKENS = 256
# Documents are generated in batches whose KV cache has about this size.
KV_CACHE_BYTES = 1 << 30
LEAST_BATCH, MOST_BATCH = 8, 256
# Under which name a forward pass returns what it keeps of the tokens it has read, and takes it: attention and hybrids,
# Mamba, RWKV.
CACHES = ("past_key_values", "cache_params", "state")
# What a document begins with, and tokens after one of which it goes on with another.
Opening = tuple[Sequence[int], frozenset[int]]
# What templates take for today: the text should not depend on it.
DAY = date(2026, 1, 1)
PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclass(frozen=True)
class Prompts:
    """What the model is asked.

    Attributes:
        asked: of each prompt, the tokens of its chat template, up to where the answer begins.
        ends: tokens that end an answer.
    """

    asked: Sequence[Sequence[int]]
    ends: frozenset[int]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, file: Path = PROMPTS) -> "Prompts | None":
        """The lines of `file`, as the chat template puts them; None for a model without a template, or with one that
        has no place for a plain prompt, or makes tokens that the model does not know.

        Args:
            model: of transformers; its generation_config, or the tokenizer, says what ends an answer.
        """
        texts = _in_template(tokenizer, file.read_text(encoding="utf-8").splitlines())
        if texts is None:
            return None
        asked = tokenizer(texts, add_special_tokens=False).input_ids
        if max(map(max, asked)) >= model.get_input_embeddings().num_embeddings:
            return None
        ends = getattr(model.generation_config, "eos_token_id", None)
        found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
        return cls(asked, frozenset(found - {None}))

    def within(self, length: int) -> "Prompts | None":
        """Those that leave half of a document of `length` tokens to the answer; None if none does."""
        short = [one for one in self.asked if len(one) <= length // 2]
        return replace(self, asked=short) if short else None


def _in_template(tokenizer: Any, lines: Sequence[str]) -> list[str] | None:
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    for plain in (True, False):  # those of models that read images may want parts
        chats = [[{"role": "user", "content": line if plain else [{"type": "text", "text": line}]}] for line in lines]
        try:
            found = tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=True, strftime_now=DAY.strftime
            )
        except Exception:  # a template is untrusted, and may raise anything
            continue
        if all(line in text for line, text in zip(lines, found, strict=True)):
            return list(found)
    return None


def from_model(
    model: Any,
    bos: int | None,
    samples: int,
    seq_len: int,
    seed: int,
    monitor: Monitor,
    prompts: Prompts | None = None,
) -> torch.Tensor:
    """Samples that the dense model generates itself, at temperature 1.

    A sample is a sequence of documents of DOCUMENT_TOKENS tokens, the last one cut. A document starts with a random
    token, and generation does not stop at an end-of-text token: there the model starts another text, as it was trained
    to. With prompts, half of them start with one, and go on after the answer as others start. Prompts that fill more
    than half of a document, because a template puts much before them, are left out.

    Args:
        model: a complete causal LM of transformers.
        bos: the token that starts every text, or None if the model has none.
        samples: number of samples.
        seq_len: tokens in a sample.
        prompts: which to answer, in an order chosen by the seed; None: none.

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
    openings = _first_tokens(model, bos, generator)
    if prompts is not None and (short := prompts.within(length)):
        monitor.say(f"half of what the model writes answers prompts, of which there are {len(short.asked)}")
        order = torch.randperm(len(short.asked), generator=generator).tolist()
        openings = _mixed(((short.asked[index], short.ends) for index in cycle(order)), openings)
    generated = [_generate(model, batch, length, openings, generator, steps) for batch in batches]
    next(steps, None)
    return torch.cat(generated).view(samples, per_sample * length)[:, :seq_len].contiguous()


def told(prompts: Prompts | None, seq_len: int) -> dict[str, Any]:
    """What recipes say of text that `from_model` writes: the temperature, and how many prompts it chose from."""
    short = prompts and prompts.within(min(seq_len, DOCUMENT_TOKENS))
    return {"written": {"temperature": 1.0, "prompts": len(short.asked) if short else 0}}


def _first_tokens(model: Any, bos: int | None, generator: torch.Generator) -> Iterator[Opening]:
    """A random token again and again, after the one that starts every text."""
    vocab_size = model.get_input_embeddings().num_embeddings
    vocab_size = min(vocab_size, getattr(text_config(model.config), "vocab_size", vocab_size))
    while True:
        first = int(torch.randint(vocab_size, (1,), generator=generator))
        yield [first] if bos is None else [bos, first], frozenset()


def _mixed(some: Iterator[Opening], others: Iterator[Opening]) -> Iterator[Opening]:
    """Half of each, whatever the number of documents in a sample."""
    for source in cycle((some, others, others, some)):
        yield next(source)


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
    model: Any,
    batch: int,
    length: int,
    openings: Iterator[Opening],
    generator: torch.Generator,
    steps: Iterator[int],
) -> torch.Tensor:
    """Documents, int64 [batch, length]; takes one of `steps` for each token.

    A model that returns no cache reads each document again for every token.
    """
    started = [next(openings) for _ in range(batch)]
    given, ends = [deque(tokens) for tokens, _ in started], [those for _, those in started]
    common = min(length, *map(len, given))
    tokens = torch.tensor([[one.popleft() for _ in range(common)] for one in given])
    cache: dict[str, Any] = {}
    cached, use_cache = 0, True
    with_positions = _takes_positions(model)
    with torch.no_grad():
        for _ in range(common):
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
            for row, one in enumerate(following):
                if given[row]:
                    one.fill_(given[row].popleft())
                elif int(one) in ends[row]:
                    opening, ends[row] = next(openings)
                    given[row].extend(opening)
            tokens = torch.cat([tokens, following], dim=1)
            next(steps)
    return tokens


def _takes_positions(model: Any) -> bool:
    """Whether a model is to be told the positions of the tokens that it reads, as transformers' `generate` tells it.

    Bamba counts them from the first one that is not in the cache. Models that read images, which count in several
    directions, find out by themselves.
    """
    return text_config(model.config) is model.config and "position_ids" in signature(model.forward).parameters

"""The calibration tokens of a run."""

from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline.calibration import data, written
from ria_vllm.offline.calibration.hub import HubText
from ria_vllm.offline.model.run.architecture import output_head, text_config
from ria_vllm.offline.model.run.hf import explained, load_dense, text_tokenizer
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.source import Source
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.memory import available
from ria_vllm.offline.self_written import check_vocabulary, spread_among
from ria_vllm.progress import Monitor

UNREAD = 8  # tokens of a sample on which nothing depends


def calibration_tokens(
    source: Source, model: StreamedModel, recipe: Recipe, monitor: Monitor, text: str | HubText, origin: dict[str, Any]
) -> torch.Tensor:
    """The tokens that the recipe asks for: int64 [drawn, seq_len], on the CPU, the held-out samples last. Those that
    the dense model writes beside a text are spread evenly among the others, in both parts. With an `eval_text`, the
    held-out ones are replaced by its own; all others are as without.

    Args:
        text: the recipe's, opened.
        origin: gets what the folder should say of text that the model wrote.

    Raises:
        RiaError: too little text, no tokenizer, or, if the dense model writes the text, too little memory for it.
    """
    if not recipe.reads_text:  # layers are run all the same, but any tokens will do
        count = (recipe.samples, min(recipe.seq_len, UNREAD))
        return torch.randint(model.vocabulary, count, generator=torch.Generator().manual_seed(recipe.seed))
    if recipe.eval_text is None:
        return _calibration(source, model, recipe, monitor, text, origin)
    tokenizer = text_tokenizer(source.folder)
    held_out = data.from_text(recipe.eval_text, tokenizer, recipe.held_out, recipe.seq_len, recipe.seed)
    check_vocabulary([held_out], model.vocabulary, source.name)
    tokens = _calibration(source, model, recipe, monitor, text, origin)
    tokens[recipe.samples :] = held_out
    return tokens


def _calibration(
    source: Source, model: StreamedModel, recipe: Recipe, monitor: Monitor, text: str | HubText, origin: dict[str, Any]
) -> torch.Tensor:
    """The same of the calibration text alone."""
    if recipe.calibration == "self":
        return _sample_model(source, model, recipe, recipe.drawn, monitor, origin)
    written = recipe.samples_written
    try:
        tokenizer = text_tokenizer(source.folder)
    except RiaError as error:
        raise RiaError(f"{error} Use --data self{', without --self-written' if written else ''}.") from None
    tokens = data.from_text(text, tokenizer, recipe.drawn - written, recipe.seq_len, recipe.seed)
    check_vocabulary([tokens], model.vocabulary, source.name)
    if written:
        fitted, held_out = recipe.written_apart
        texts = tokens.split([recipe.samples - fitted, recipe.held_out - held_out])
        own = _sample_model(source, model, recipe, written, monitor, origin).split([fitted, held_out])
        tokens = torch.cat([spread_among(*both) for both in zip(texts, own, strict=True)])
    return tokens.long()


def _sample_model(
    source: Source, model: StreamedModel, recipe: Recipe, samples: int, monitor: Monitor, origin: dict[str, Any]
) -> torch.Tensor:
    """So many samples that the dense model writes: int64 [samples, seq_len]."""
    option, way_out = "--data self", "Give a text file to --data"
    if recipe.samples_written:
        option, way_out = "--self-written", "Leave it out"
    if output_head(model.model) is None:
        raise RiaError(
            f"{source.name}: the forward pass of a {type(model.model).__name__} gives no logits of tokens, which "
            f"{option} needs. {way_out}."
        )
    _check_whole_fits(source, model, option, way_out)
    with (
        monitor.phase("loading the whole model"),
        explained(f"{source.name}: transformers cannot load the model"),
    ):
        # Eager attention, because for one token at a time a CPU's fused kernels are much slower. It is also what
        # `attention_options` asks for, if anything.
        whole = load_dense(type(model.model), source.folder, model.dtype, attn_implementation="eager")
        whole = whole.to(model.device).eval()
    bos = getattr(text_config(source.config), "bos_token_id", None)  # GLM-4V's configuration has none
    try:
        tokenizer = text_tokenizer(source.folder)
    except RiaError:  # none is needed
        tokenizer = None
    prompts = written.Prompts.of(whole, tokenizer)
    origin |= written.told(prompts, recipe.seq_len)
    return written.from_model(whole, bos, samples, recipe.seq_len, recipe.seed, monitor, prompts)


def _check_whole_fits(source: Source, model: StreamedModel, option: str, way_out: str) -> None:
    """Refuse to load a dense model that does not fit into memory: the system would kill the process without a word.

    Args:
        option: which one needs the whole model.
    """
    count, dtype = sum(parameter.numel() for parameter in model.model.parameters()), model.dtype
    weights = count * dtype.itemsize
    # What is dequantized is on the CPU a second time while it is loaded: see `load_dense`.
    twice = 0 if model.tensors.scheme is None else count * model.stored_dtype.itemsize
    for device, needed in {model.device: weights, torch.device("cpu"): weights + twice}.items():
        free = available(device)
        if free is not None and needed > free:
            raise RiaError(
                f"{source.name}: {option} runs the whole dense model in {name_of(dtype)}, which takes "
                f"{needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are free ({device}). {way_out}; then "
                "decoder layers are in memory one at a time."
            )

"""`ria-vllm eval`: perplexity of a dense or a compressed folder, and tasks through lm-evaluation-harness."""

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError

from ria_vllm.checkpoint import Reader, is_compressed, weight_files
from ria_vllm.errors import RiaError
from ria_vllm.model_card import Measured, check_card, note_perplexity
from ria_vllm.offline.model.dtypes import CHOICES, choose_dtype, name_of
from ria_vllm.progress import Monitor


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood; `tokens` counts the predicted ones, all but the first of each window."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RiaError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    return torch.device(name)


def load_model(folder: str, device: torch.device, compute_dtype: str | None = None) -> Any:
    """A transformers causal LM in evaluation mode; a compressed folder is decompressed in memory.

    Args:
        folder: a folder, or a hub id of a dense model.
        compute_dtype: what it is to compute in, one of `ria_vllm.offline.model.dtypes.CHOICES`; None: as it is stored.

    Raises:
        RiaError: not a model, a damaged compressed one, or a `compute_dtype` that would round its weights.
    """
    stored = None if compute_dtype is None else _dtype_in(read_config(folder))
    if stored is not None:
        return _loaded(folder, device, choose_dtype(stored, device, compute_dtype))
    model = _loaded(folder, device, "auto")
    dtype = model.dtype if compute_dtype is None else choose_dtype(model.dtype, device, compute_dtype)
    # Once more, not cast: what the model computes for itself while it is loaded was rounded to the first dtype.
    return model if dtype == model.dtype else _loaded(folder, device, dtype)


def read_config(folder: str) -> Any:
    """The configuration of a folder or hub id, as transformers has it."""
    from transformers import AutoConfig

    with _understood(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _dtype_in(config: Any) -> torch.dtype | None:
    """What the weights are stored in, if the configuration says so."""
    dtype = config.dtype or config.get_text_config().dtype
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


@contextmanager
def _understood(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and Path(folder).is_dir():
            weight_files(Path(folder))  # names the broken file
        reason = reason_of(error)
        raise RiaError(f"{folder}: transformers cannot load it as a causal language model: {reason}") from error


def _loaded(folder: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Weights that do not fit are refused below, by name; transformers' own message only says which flag ignores them.
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _understood(folder):
        if not is_compressed(Path(folder)):
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
        else:
            state = dense_state(Reader(folder))
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            del config.quantization_config
            with torch.device("meta"):
                architecture = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
            kind = config.dtype or "auto" if dtype == "auto" else dtype
            model, info = architecture.from_pretrained(None, config=config, state_dict=state, dtype=kind, **options)
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise RiaError(
            f"{folder}: {name} has shape {tuple(found)}, config.json asks for {tuple(wanted)}. Get the files again."
        )
    if info["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise RiaError(f"{folder}: weights missing: {', '.join(sorted(info['missing_keys'])[:5])}. Get the files again.")
    return model.to(device).eval()


def dense_state(reader: Reader) -> dict[str, torch.Tensor]:
    """Every tensor of the dense model, in the model's own channel order."""
    state = {f"{name}.weight": reader.linear(name).dense() for name in reader.sparse_names}
    return state | {name: reader.tensor(name) for name in reader.dense_names}


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        RiaError: none, or one that needs Python code of its own, which is not run.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise RiaError(f"{folder}: no tokenizer that transformers can load ({reason_of(error)}).") from error


def reason_of(error: Exception) -> str:
    """What transformers says, but not its advice to let a model's own code run, which nothing here does."""
    return "it needs its own Python code, which is not run here" if "trust_remote_code" in str(error) else str(error)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever goes wrong in transformers' code becomes a RiaError that begins with `what`; its cause is that error."""
    try:
        yield
    except RiaError:
        raise
    except Exception as error:
        if "memory" in str(error) or "CUDA" in str(error):  # is no fault of the model's
            raise
        reason = (reason_of(error).strip() or type(error).__name__).splitlines()[0]
        raise RiaError(f"{what} ({reason}).") from error


def read_tokens(folder: str, text: Path, max_tokens: int | None) -> torch.Tensor:
    """int64 [tokens] of a text file, with the special tokens that the model's tokenizer puts at the start."""
    try:
        content = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RiaError(f"{text}: not readable as text ({error}).") from None
    tokenizer = load_tokenizer(folder)
    # The warning about texts longer than the context does not apply: the windows are cut below.
    tokens = torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.int64)
    return tokens if max_tokens is None else tokens[:max_tokens]


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor, seq_len: int, monitor: Monitor | None = None) -> Perplexity:
    """Over consecutive windows of `seq_len` tokens, each on its own; what is left at the end is dropped.

    A text shorter than one window is one window. Log-likelihoods are summed in float64 from float32 logits.

    Raises:
        RiaError: fewer than two tokens, or logits that are not finite.
    """
    if len(tokens) < 2:
        raise RiaError(f"the text has {len(tokens)} tokens; at least two are needed to predict one.")
    seq_len = min(seq_len, len(tokens))
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    total = torch.zeros((), dtype=torch.float64)
    monitor = monitor or Monitor(shown=False)
    for number, window in enumerate(monitor.steps(windows, "windows", len(windows))):
        window = window.to(model.device)
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").double().cpu()
        if not math.isfinite(total):
            raise RiaError(f"window {number + 1}: the model's logits are not finite. Check the folder with `verify`.")
    count = len(windows) * (seq_len - 1)
    mean = float(total) / count
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, count, len(windows), seq_len)


@click.command()
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), help="A text file: measure perplexity on it.")
@click.option("--seq-len", type=click.IntRange(min=2), help="Tokens a window; 1024, or a shorter context of the model.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only the first so many tokens of the text.")
@click.option("--baseline", help="Also measure this model, the dense one that MODEL was pruned from, on the same text.")
@click.option("--update-card", is_flag=True, help="Note the perplexity in MODEL's README.md; MODEL is a folder then.")
@click.option("--tasks", help="Comma-separated tasks for lm-evaluation-harness (needs lm_eval).")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of further tasks for --tasks, as YAML.",
)
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True, help="What runs --tasks.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many examples of each task.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--compute-dtype",
    type=click.Choice(CHOICES),
    default="auto",
    show_default=True,
    help="auto: the model's own, or float32 where the device is slow in that.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    model: str,
    text: Path | None,
    seq_len: int | None,
    max_tokens: int | None,
    baseline: str | None,
    update_card: bool,
    tasks: str | None,
    include_path: Path | None,
    engine: str,
    limit: int | None,
    device: str,
    compute_dtype: str,
    as_json: bool,
) -> None:
    """Measure MODEL: a Hugging Face folder or hub id, or a folder that `ria-vllm compress` wrote."""
    if (text is None) == (tasks is None):
        raise RiaError("eval: give --text FILE for perplexity, or --tasks NAMES for lm-evaluation-harness.")
    if tasks is not None:
        if baseline is not None or update_card:
            raise RiaError("eval: --baseline and --update-card are for perplexity. Give --text FILE instead of --tasks.")
        if engine == "vllm" and compute_dtype != "auto":
            raise RiaError("eval: --compute-dtype is for --engine hf; vLLM takes the model's own. Leave one out.")
        from ria_vllm.offline.evaluation.tasks import run_tasks

        place = choose_device(device)
        results = run_tasks(model, tasks.split(","), engine, limit, place, include_path, compute_dtype)
        click.echo(json.dumps(results, indent=2) if as_json else task_lines(results))
        return
    assert text is not None
    if update_card:
        check_card(Path(model))
    monitor, place = Monitor(), choose_device(device)
    models = [model] if baseline is None else [model, baseline]
    configs = {name: read_config(name) for name in models}
    seq_len = window_length(configs, seq_len)
    compute_dtype = common_dtype(list(configs.values()), place, compute_dtype)
    with monitor.live():
        with monitor.phase("reading the text"):
            tokens = read_tokens(model, text, max_tokens)
            if baseline is not None and not torch.equal(read_tokens(baseline, text, max_tokens), tokens):
                raise RiaError(
                    f"{baseline}: reads the text as other tokens than {model}, so their perplexities do not compare."
                )
        with monitor.phase("loading the model"):
            loaded = load_model(model, place, compute_dtype)
        dtype = name_of(loaded.dtype)
        found, dense = perplexity(loaded, tokens, seq_len, monitor), None
        del loaded  # before the other model is read
        if baseline is not None:
            with monitor.phase("loading the baseline"):
                loaded = load_model(baseline, place, dtype)
            dense = perplexity(loaded, tokens, seq_len, monitor)
    if as_json:
        about = {"model": model, "text": str(text), "compute_dtype": dtype, **asdict(found)}
        click.echo(json.dumps(about | ({"baseline": {"model": baseline, **asdict(dense)}} if dense else {}), indent=2))
    else:
        windows = f"{found.windows} windows of {found.seq_len}"
        click.echo(f"perplexity {found.perplexity:.4f} ({found.tokens} tokens, {windows}, computed in {dtype})")
        if dense is not None:
            click.echo(f"{baseline}: perplexity {dense.perplexity:.4f}")
    if update_card:
        other = None if dense is None else dense.perplexity
        note_perplexity(Path(model), Measured(text.name, found.tokens, found.seq_len, found.perplexity, other))


def window_length(configs: Mapping[str, Any], asked: int | None) -> int:
    """One for all models: positions past a context would fail deep inside the model, or give meaningless numbers."""
    texts = {model: config.get_text_config() for model, config in configs.items()}
    contexts = {model: getattr(text, "max_position_embeddings", None) or math.inf for model, text in texts.items()}
    model, longest = min(contexts.items(), key=lambda entry: entry[1])
    if asked is None:
        return min(1024, longest)
    if asked > longest:
        raise RiaError(f"--seq-len {asked}: the context is {longest} tokens ({model}). Choose a smaller window.")
    return asked


def common_dtype(configs: Sequence[Any], device: torch.device, asked: str) -> str:
    """What all models are computed in, the widest that one of them needs; `asked` if a configuration is silent."""
    stored = [_dtype_in(config) for config in configs]
    if None in stored:
        return asked
    return name_of(functools.reduce(torch.promote_types, [choose_dtype(dtype, device, asked) for dtype in stored]))


def task_lines(results: dict[str, Any]) -> str:
    return "\n".join(
        f"{task}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        for task, metrics in results["tasks"].items()
    )

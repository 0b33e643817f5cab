"""`ria-vllm eval`: perplexity of a dense or a compressed folder, and tasks through lm-evaluation-harness."""

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.errors import RiaError
from ria_vllm.files.text_file import read_text
from ria_vllm.format.weight_format import name_of
from ria_vllm.hub.facts import PERPLEXITY, TASKS, add, add_speed, check_card
from ria_vllm.offline.evaluation.recovery import EXPLAINED, TITLES, average, cells, compare, comparison
from ria_vllm.offline.evaluation.tasks import Harness, run_tasks
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.dtypes import CHOICES, choose_dtype
from ria_vllm.offline.model.run.hf import (
    configured_dtype,
    dequantized_from,
    folder_of,
    load_model,
    load_tokenizer,
    read_config,
)
from ria_vllm.offline.runtime import options
from ria_vllm.offline.runtime.device import choose_device
from ria_vllm.progress import Monitor
from ria_vllm.terminal import GroupedCommand, grouped, print_table


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood. `tokens` counts predicted tokens: all but the first of each window."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int


def read_tokens(folder: str, text: Path, max_tokens: int | None) -> torch.Tensor:
    """The tokens of a text file, int64 [tokens], with the special tokens that the model's tokenizer puts at the start.

    Raises:
        RiaError: the text cannot be read, or the model has no tokenizer.
    """
    content = read_text(text)
    tokenizer = load_tokenizer(folder)
    # Not verbose: the warning about texts longer than the context does not apply, because the text is cut into windows.
    tokens = torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.int64)
    return tokens if max_tokens is None else tokens[:max_tokens]


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor, seq_len: int, monitor: Monitor | None = None) -> Perplexity:
    """Perplexity over consecutive windows of `seq_len` tokens, each on its own; an incomplete last one is dropped.

    A text shorter than one window is one window. Log-likelihoods are computed in float32 and summed in float64.

    Args:
        model: a causal LM of transformers.
        tokens: int64 [tokens].

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


@dataclass(frozen=True)
class Options:
    """The arguments of the command; see its help."""

    model: str
    eval_text: Path | None
    seq_len: int | None
    eval_tokens: int | None
    baseline: str | None
    update_card: bool
    tasks: str | None
    include_path: Path | None
    limit: int | None
    device: str
    compute_dtype: str
    as_json: bool

    @property
    def models(self) -> list[str]:
        """The baseline last, if there is one."""
        return [self.model] if self.baseline is None else [self.model, self.baseline]


PERPLEXITIES, SCORES = "Perplexity on a text", "Scores in tasks"  # groups of options


@click.command(cls=GroupedCommand)
@click.argument("model")
@grouped(
    "--eval-data",
    "eval_text",
    group=PERPLEXITIES,
    type=click.Path(path_type=Path),
    help="A text file: measure perplexity on it.",
)
@grouped(
    "--seq-len",
    group=PERPLEXITIES,
    type=click.IntRange(min=2),
    help="Tokens per window; by default 1024, or the model's context if that is shorter.",
)
@grouped(
    "--eval-tokens",
    group=PERPLEXITIES,
    type=click.IntRange(min=2),
    help="Use at most this many tokens, from the start of the text.",
)
@click.option(
    "--baseline",
    help="Also measure this model, the dense one that MODEL was pruned from, on the same text or tasks; with --tasks, "
    "also say how many percent of its scores MODEL has recovered.",
)
@click.option(
    "--update-card",
    is_flag=True,
    help="Add what was measured to MODEL's README.md and ria_report.json, and the table of `bench -o MODEL/bench`. "
    "MODEL must be a folder.",
)
@grouped("--tasks", group=SCORES, help="Comma-separated tasks for lm-evaluation-harness (needs lm_eval).")
@grouped(
    "--include-path",
    group=SCORES,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder with more tasks for --tasks, as YAML files.",
)
@grouped("--limit", group=SCORES, type=click.IntRange(min=1), help="Use at most this many examples of each task.")
@options.device
@grouped(
    "--compute-dtype",
    group=options.RUN,
    type=click.Choice(CHOICES),
    default="auto",
    show_default=True,
    help="auto: the model's own, unless the device computes slowly in it; then float32.",
)
@grouped("--json", "as_json", group=options.RUN, is_flag=True, help="Print one JSON object.")
def evaluate(**options: Any) -> None:
    """Measure MODEL: a Hugging Face folder or hub id, or a folder that `ria-vllm compress` wrote."""
    asked = Options(**options)
    if (asked.eval_text is None) == (asked.tasks is None):
        raise RiaError("eval: give --eval-data FILE for perplexity, or --tasks NAMES for lm-evaluation-harness.")
    if asked.update_card:
        check_card(Path(asked.model))
    if asked.eval_text is not None:
        evaluate_text(asked, asked.eval_text)
    else:
        evaluate_tasks(asked, str(asked.tasks).split(","))
    if asked.update_card:
        folder = Path(asked.model)
        found = [*folder.glob("bench.md"), *folder.glob("*/bench.md")]
        if found:
            add_speed(folder, max(found, key=lambda path: path.stat().st_mtime))


def evaluate_text(asked: Options, text: Path) -> None:
    """`eval --eval-data`."""
    monitor, device, inputs = Monitor(), choose_device(asked.device), Inputs(text)
    folders = folders_of(asked.models, inputs)
    configs = {name: read_config(folder) for name, folder in folders.items()}
    seq_len = window_length(configs, asked.seq_len)
    dtype = common_dtype(list(configs.values()), device, asked.compute_dtype)
    found: dict[str, Perplexity] = {}
    with monitor.live(), inputs.watched():
        with monitor.phase("reading the text"):
            tokens, *others = (read_tokens(folder, text, asked.eval_tokens) for folder in folders.values())
        if not all(torch.equal(tokens, other) for other in others):
            raise RiaError(
                f"{asked.baseline}: splits the text into different tokens than {asked.model}, so the perplexities are "
                "not comparable."
            )
        for name, folder in folders.items():
            with monitor.phase(f"loading {name}"):
                loaded = load_model(folder, device, dtype)
            dtype = name_of(loaded.dtype)  # for the baseline, too
            found[name] = perplexity(loaded, tokens, seq_len, monitor)
            del loaded  # before the next one is loaded
    inputs.check()
    own, dense = found[asked.model], None if asked.baseline is None else found[asked.baseline]
    if asked.as_json:
        about = {
            "model": asked.model,
            "text": str(text),
            "compute_dtype": dtype,
            **_dequantized(configs),
            **asdict(own),
        }
        compared = {} if dense is None else {"baseline": {"model": asked.baseline} | asdict(dense)}
        click.echo(json.dumps(about | compared, indent=2))
    else:
        _say_dequantized(configs)
        windows = f"{own.windows} windows of {own.seq_len}"
        click.echo(f"perplexity {own.perplexity:.4f} ({own.tokens} tokens, {windows}, computed in {dtype})")
        if dense is not None:
            click.echo(f"{asked.baseline}: perplexity {dense.perplexity:.4f}")
    if asked.update_card:
        row = {"text": text.name, "tokens": str(own.tokens), "window": str(own.seq_len)}
        perplexities = {"perplexity": own, "base model": dense}
        shown = {name: "" if one is None else f"{one.perplexity:.2f}" for name, one in perplexities.items()}
        add(Path(asked.model), PERPLEXITY, [row | shown], key=tuple(row))


def evaluate_tasks(asked: Options, tasks: list[str]) -> None:
    """`eval --tasks`."""
    model, baseline, own_tasks, device = asked.model, asked.baseline, asked.include_path, choose_device(asked.device)
    inputs = Inputs(*(path for path in (own_tasks.rglob("*") if own_tasks else ()) if path.is_file()))
    folders = folders_of(asked.models, inputs)
    configs = {name: read_config(folder) for name, folder in folders.items()}
    dtype = common_dtype(list(configs.values()), device, asked.compute_dtype)
    harness, monitor, dense = Harness(tasks, asked.limit, device, own_tasks, dtype), Monitor(), None
    with inputs.watched():
        found = run_tasks(folders[model], harness, monitor)
        if baseline is not None:
            dense = run_tasks(folders[baseline], harness, monitor, "the baseline")
    inputs.check()
    program = f"lm-evaluation-harness {version('lm_eval')}"
    rows, mean = compare(found, dense), None if dense is None else average(found, dense)
    shown = cells(rows if mean is None else [*rows, mean])
    if asked.as_json:
        about = {
            "model": model,
            "harness": program,
            **_dequantized(configs),
            "tasks": {task: scores.metrics for task, scores in found.items()},
            "examples": {task: scores.examples for task, scores in found.items()},
        }
        compared = {} if dense is None else comparison(rows, mean, dense, str(baseline))
        click.echo(json.dumps(about | compared, indent=2))
    else:
        _say_dequantized(configs)
        print_table(TITLES, shown)
    if asked.update_card:
        rows_by_title = [dict(zip(TITLES, row, strict=True)) for row in shown]
        add(Path(model), TASKS, rows_by_title, f"Scores of {program}, {EXPLAINED}")


def folders_of(models: Sequence[str], inputs: Inputs) -> dict[str, str]:
    """Model -> its folder, which becomes one of the inputs. A hub id has one folder, whatever is pushed meanwhile."""
    found = {model: folder_of(model) for model in models}
    for folder in found.values():
        inputs.stamps(folder)
    return {model: str(folder) for model, folder in found.items()}


def _dequantized(configs: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """For --json: how the weights of models are quantized that were dequantized to measure them."""
    found = {name: method for name, config in configs.items() if (method := dequantized_from(config))}
    return {"dequantized_from": found} if found else {}


def _say_dequantized(configs: Mapping[str, Any]) -> None:
    for name, method in _dequantized(configs).get("dequantized_from", {}).items():
        click.echo(f"{name}: its weights are quantized ({method}), and were dequantized to be measured")


def window_length(configs: Mapping[str, Any], asked: int | None) -> int:
    """The window length for all models.

    Positions beyond a model's context would fail deep inside the model, or give meaningless numbers.

    Raises:
        RiaError: `asked` is longer than the context of one of them.
    """
    texts = {model: text_config(config) for model, config in configs.items()}
    contexts = {model: getattr(text, "max_position_embeddings", None) or sys.maxsize for model, text in texts.items()}
    model, longest = min(contexts.items(), key=lambda entry: entry[1])
    if asked is None:
        return min(1024, longest)
    if asked > longest:
        raise RiaError(f"--seq-len {asked}: the context is {longest} tokens ({model}). Choose a smaller window.")
    return asked


def common_dtype(configs: Sequence[Any], device: torch.device, asked: str) -> str:
    """The dtype to compute all models in: the widest that one of them needs; `asked` if a configuration has none."""
    stored = [configured_dtype(config) for config in configs]
    if None in stored:
        return asked
    return name_of(functools.reduce(torch.promote_types, [choose_dtype(dtype, device, asked) for dtype in stored]))

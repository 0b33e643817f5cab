"""How a pruned chat model answers: `python -m benchmarks.answers MODEL OUT...`.

MODEL answers 200 prompts, which are not among those that `compress` calibrates on: once at temperature 1, once always
with the likeliest token. On its answers, token by token: perplexity, KL(MODEL || OUT) in nats, and how often the same
token is the likeliest. Then each OUT answers itself, with the likeliest tokens: how long, and how much it repeats.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.defaults import compared
from ria_vllm.offline.calibration.written import Prompts
from ria_vllm.offline.model.run.hf import load_model, text_tokenizer

PROMPTS = Path(__file__).with_name("prompts.txt")
NGRAM, SHOWN = 4, 300


@torch.inference_mode()
def answers(model: Any, prompts: Prompts, sampled: bool, tokens: int, batch: int = 25) -> list[list[int]]:
    """What `model` answers to each prompt, its end included, at most `tokens` of them."""
    found: list[list[int]] = []
    ends = sorted(prompts.ends)
    for first in range(0, len(prompts.asked), batch):
        part = prompts.asked[first : first + batch]
        width = max(map(len, part))
        padded = torch.tensor([[0] * (width - len(one)) + list(one) for one in part])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
        torch.manual_seed(first)
        # Whatever the model's generation_config says.
        how: dict[str, Any] = {"do_sample": sampled, "num_beams": 1, "repetition_penalty": 1.0}
        how |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {}
        how |= {"eos_token_id": ends or None, "pad_token_id": 0, "max_new_tokens": tokens}
        out = model.generate(padded, attention_mask=mask, **how)
        for row in out[:, width:].tolist():
            stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
    return found


def repeated(answer: Sequence[int]) -> float:
    """The share of NGRAM tokens in a row that stood in the answer before."""
    grams = [tuple(answer[at : at + NGRAM]) for at in range(len(answer) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


@click.command(help=__doc__)
@click.argument("model")
@click.argument("outs", nargs=-1, required=True)
@click.option("--tokens", default=128, show_default=True, help="The most in an answer.")
@click.option("--show", default=0, show_default=True, help="So many answers of each are printed.")
@click.option("--prompts", "limit", default=200, show_default=True, help="How many.")
def main(model: str, outs: Sequence[str], tokens: int, show: int, limit: int) -> None:
    cpu = torch.device("cpu")
    dense, tokenizer = load_model(model, cpu, "auto"), text_tokenizer(Path(model))
    found = Prompts.of(dense, tokenizer, PROMPTS)
    if found is None:
        raise click.UsageError(f"{model} has no chat template.")
    prompts = replace(found, asked=found.asked[:limit])
    own = {sampled: answers(dense, prompts, sampled, tokens) for sampled in (True, False)}
    columns = [f"{how}: {what}" for how in ("sampled", "likeliest") for what in ("perplexity", "KL", "agreement")]
    click.echo(row("", *columns, "length", "repeated") + "\n" + "| --- " * (len(columns) + 3) + "|")
    for name in (model, *outs):
        pruned = dense if name == model else load_model(name, cpu, "auto")
        cells: list[str] = []
        for answered in own.values():
            pairs = zip(prompts.asked, answered, strict=True)
            of = compared(dense, pruned, ((torch.tensor([*prompt, *answer]), len(prompt)) for prompt, answer in pairs))
            cells += [f"{of['perplexity']:.2f}", f"{of['kl']:.3f}", f"{of['agreement']:.1%}"]
        said = own[False] if name == model else answers(pruned, prompts, False, tokens)
        length, share = (sum(map(measure, said)) / len(said) for measure in (len, repeated))
        click.echo(row(Path(name).name, *cells, f"{length:.0f}", f"{share:.1%}"))
        for tokens_asked, answer in zip(prompts.asked[:show], said, strict=False):
            question, text = tokenizer.decode(tokens_asked), tokenizer.decode(answer)
            click.echo(f"\n> {question[-SHOWN:]!r}\n\n{text[:SHOWN]!r}", err=True)


if __name__ == "__main__":
    main()

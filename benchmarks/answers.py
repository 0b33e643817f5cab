"""How a pruned chat model answers: `python -m benchmarks.answers MODEL OUT...`.

MODEL answers 200 prompts, which are not among those that `compress` calibrates on: once at temperature 1, once always
with the likeliest token. On its answers, token by token: perplexity, KL(MODEL || OUT) in nats, and how often the same
token is the likeliest. Then each OUT answers itself, with the likeliest tokens: how long, and how much it repeats.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from ria_vllm.offline.calibration.written import Prompts
from ria_vllm.offline.distill.divergence import divergence
from ria_vllm.offline.model.run.hf import load_model, text_tokenizer

PROMPTS = Path(__file__).with_name("prompts.txt")
NGRAM, SHOWN = 4, 300


@torch.inference_mode()
def answers(model: Any, asked: Sequence[Sequence[int]], sampled: bool, tokens: int, batch: int = 25) -> list[list[int]]:
    """What `model` answers to each prompt, its end included, at most `tokens` of them."""
    found: list[list[int]] = []
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        width = max(map(len, part))
        padded = torch.tensor([[0] * (width - len(one)) + list(one) for one in part])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
        torch.manual_seed(first)
        # Whatever the model's generation_config says.
        how: dict[str, Any] = {"do_sample": sampled, "num_beams": 1, "repetition_penalty": 1.0}
        how |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {}
        out = model.generate(padded, attention_mask=mask, max_new_tokens=tokens, pad_token_id=min(ends), **how)
        for row in out[:, width:].tolist():
            stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
    return found


def repeated(answer: Sequence[int]) -> float:
    """The share of NGRAM tokens in a row that stood in the answer before."""
    grams = [tuple(answer[at : at + NGRAM]) for at in range(len(answer) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def compared(
    dense: Any, pruned: Any, asked: Sequence[Sequence[int]], answered: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Of the tokens of answers: perplexities, KL, and how often both models have the same for the likeliest."""
    total = torch.zeros(4, dtype=torch.float64)
    for prompt, answer in zip(asked, answered, strict=True):
        x, y = torch.tensor([[*prompt, *answer]]), torch.tensor(answer)
        logits = [model(x, use_cache=False).logits[0, len(prompt) - 1 : -1] for model in (dense, pruned)]
        losses = [torch.nn.functional.cross_entropy(one.float(), y, reduction="sum") for one in logits]
        same = (logits[0].argmax(-1) == logits[1].argmax(-1)).sum()
        total += torch.tensor([*losses, divergence(*logits).sum(), same], dtype=torch.float64)
    of_dense, of_pruned, kl, same_token = (total / sum(map(len, answered))).tolist()
    return {"dense": math.exp(of_dense), "perplexity": math.exp(of_pruned), "kl": kl, "agreement": same_token}


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
    asked = found.asked[:limit]
    own = {sampled: answers(dense, asked, sampled, tokens) for sampled in (True, False)}
    columns = [f"{how}: {what}" for how in ("sampled", "likeliest") for what in ("perplexity", "KL", "agreement")]
    click.echo(row("", *columns, "length", "repeated") + "\n" + "| --- " * (len(columns) + 3) + "|")
    for name in (model, *outs):
        pruned = dense if name == model else load_model(name, cpu, "auto")
        cells: list[str] = []
        for answered in own.values():
            of = compared(dense, pruned, asked, answered)
            cells += [f"{of['perplexity']:.2f}", f"{of['kl']:.3f}", f"{of['agreement']:.1%}"]
        said = own[False] if name == model else answers(pruned, asked, False, tokens)
        length, share = (sum(map(measure, said)) / len(said) for measure in (len, repeated))
        click.echo(row(Path(name).name, *cells, f"{length:.0f}", f"{share:.1%}"))
        for tokens_asked, answer in zip(asked[:show], said, strict=False):
            question, text = tokenizer.decode(tokens_asked), tokenizer.decode(answer)
            click.echo(f"\n> {question[-SHOWN:]!r}\n\n{text[:SHOWN]!r}", err=True)


if __name__ == "__main__":
    main()

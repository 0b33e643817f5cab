"""`python -m benchmarks.text_tasks`: what its examples are, and the harness's scores on them against plain torch."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.text_tasks import main
from ria_vllm.offline.evaluation.tasks import Harness, run_tasks
from ria_vllm.offline.model.run.hf import load_model, load_tokenizer

NAMES = [
    first + last for first in ("Anna", "Bertha", "Clara", "Doris") for last in ("", "line", "bell", "mary", "rose")
]
VERBS = ["sees", "knows", "likes", "follows", "greets"]
DAYS = ["yesterday", "today", "in the morning", "before dinner", "on some other day"]


def paragraph(generator: random.Random) -> str:
    """Sentences whose words occur again and again."""
    pick = generator.choice
    return " ".join(f"Then {pick(NAMES)} {pick(VERBS)} her friend {pick(DAYS)} with {pick(NAMES)}." for _ in range(3))


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    """Four documents of 30 paragraphs with three sentences each."""
    generator = random.Random(1)
    path = tmp_path_factory.mktemp("prose") / "My text.txt"
    documents = ["\n".join(paragraph(generator) for _ in range(30)) for _ in range(4)]
    path.write_text("\n\n".join(documents) + "\n")
    return path


def make(text: Path, out: Path, *options: str) -> dict[str, list[dict]]:
    done = CliRunner().invoke(main, [str(text), "-o", str(out), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in out.glob("*.jsonl")}


def test_the_same_seed_gives_the_same_bytes(prose, tmp_path):
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        make(prose, tmp_path / folder, "--examples", "10", "--seed", seed)
    for name in ("my_text_last_word.jsonl", "my_text_continuation.jsonl"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b != c


def log_likelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """By definition, and whether every token of it is the likeliest."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    steps = range(start, len(ids))
    return sum(float(log_p[i - 1, ids[i]]) for i in steps), all(int(log_p[i - 1].argmax()) == ids[i] for i in steps)


@pytest.fixture(scope="module")
def long_llama(tiny_llama, tmp_path_factory) -> Path:
    """A random model whose context holds a passage, a token for each byte."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("long")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_harness_scores_them_as_they_are_meant(long_llama, prose, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    examples = make(prose, tmp_path, "--examples", "60")
    names = ["my_text_last_word", "my_text_continuation"]
    found = run_tasks(str(long_llama), Harness(names, folder=tmp_path, compute_dtype="float32"))
    model, tokenizer = load_model(str(long_llama), torch.device("cpu")), load_tokenizer(str(long_llama))
    words = [log_likelihood(model, tokenizer, e["context"], f" {e['word']}") for e in examples[names[0]]]
    metrics = found[names[0]].metrics
    assert metrics["perplexity"] == pytest.approx(math.exp(-sum(value for value, _ in words) / 60), rel=1e-4)
    assert metrics["acc"] == pytest.approx(sum(greedy for _, greedy in words) / 60)
    assert found[names[0]].rising == ("acc",) and found[names[0]].examples == 60
    right = {"acc": 0, "acc_norm": 0}
    for example in examples[names[1]]:
        values = [log_likelihood(model, tokenizer, example["context"], f" {c}")[0] for c in example["choices"]]
        by_length = [value / len(choice) for value, choice in zip(values, example["choices"], strict=True)]
        right["acc"] += values.index(max(values)) == example["answer"]
        right["acc_norm"] += by_length.index(max(by_length)) == example["answer"]
    metrics = found[names[1]].metrics
    assert {name: metrics[name] for name in right} == pytest.approx({name: n / 60 for name, n in right.items()})
    # A random model guesses: 60 guesses with a chance of 1/4 are almost never outside of these.
    assert 0.05 < metrics["acc_norm"] < 0.5

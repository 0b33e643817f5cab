"""`eval --tasks`: a task, the error without the harness, and which of its results are reported."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ria_vllm import progress
from ria_vllm.errors import RiaError
from ria_vllm.offline.evaluation.evaluate import evaluate
from ria_vllm.offline.evaluation.tasks import Harness, numbers, refuse_nan, run_tasks, scores


def test_without_the_harness_the_message_says_how_to_get_it(monkeypatch, pruned_llama):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RiaError, match="pip install lm_eval"):
        run_tasks(str(pruned_llama.folder), Harness(["arc_easy"]))


def test_only_metrics_are_kept():
    entry = {
        "alias": "arc",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact,strict": 1,
        "flag": True,
        "sample_len": 9,
    }
    assert numbers(entry) == {"acc": 0.5, "exact,strict": 1.0}


def test_what_the_harness_says_of_its_tasks():
    output = {
        "results": {
            "both": {"acc,none": 0.5, "alias": "both"},
            "easy": {"perplexity,none": 3.0, "acc,none": 0.75, "acc_stderr,none": 0.1},
            "hard": {"acc,none": 0.25},
            "tag": {"alias": "tag"},
            "own": {"exact_match,strict": 0.5, "odd,none": 1.0},
        },
        "group_subtasks": {"both": ["easy", "hard"], "tag": ["own"]},
        "higher_is_better": {
            "both": {"acc": True}, "easy": {"perplexity": False, "acc": True}, "hard": {"acc": True},
            "own": {"exact_match": True, "odd": None},
        },
        "n-samples": {"easy": {"original": 40, "effective": 4}, "hard": {"original": 4, "effective": 4}},
        "n-shot": {"easy": 0, "hard": 5},
    }  # fmt: skip
    found = scores(output)
    assert {task: entry.rising for task, entry in found.items()} == {
        "both": ("acc",), "easy": ("acc",), "hard": ("acc",), "tag": (), "own": ("exact_match,strict",),
    }  # fmt: skip
    assert [task for task, entry in found.items() if entry.in_group] == ["easy", "hard"]  # `tag` has no mean
    assert (found["easy"].examples, found["hard"].shots, found["both"].examples) == (4, 5, None)


def test_an_answer_without_a_likelihood_is_no_answer():
    fine = {"doc_id": 6, "filtered_resps": [(-1.5, False), (-math.inf, True)]}
    text = {"doc_id": 7, "filtered_resps": ["nan"]}
    refuse_nan("folder", {"arc": [fine, text]})
    with pytest.raises(RiaError, match="folder: arc, example 8: .*log-likelihood is NaN.*verify"):
        refuse_nan("folder", {"arc": [fine, {"doc_id": 8, "filtered_resps": [(-1.5, False), (math.nan, False)]}]})


QUESTIONS = [{"question": f"item {i} is", "choices": [" red", " green", " blue"], "answer": i % 3} for i in range(8)]


def save_task(folder: Path, name: str, examples: list[dict], asked: dict) -> None:
    """A task for the harness, with its examples in a local file."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | data | asked))


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with the task `colours`, its examples in a local file."""
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    save_task(tmp_path, "colours", QUESTIONS, choice)
    return tmp_path


def right_answers(folder: Path, source: Path) -> int:
    """The number of questions whose right choice the pruned model finds most likely, in plain transformers."""
    from transformers import AutoTokenizer

    from ria_vllm.offline.model.run.hf import load_model

    model, tokenizer = load_model(str(folder), torch.device("cpu")), AutoTokenizer.from_pretrained(source)
    right = 0
    for question in QUESTIONS:
        likelihoods = []
        for choice in question["choices"]:
            start = len(tokenizer(question["question"])["input_ids"])
            ids = torch.tensor([tokenizer(question["question"] + choice)["input_ids"]])
            with torch.no_grad():
                logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
            likelihoods.append(float(logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        right += likelihoods.index(max(likelihoods)) == question["answer"]
    return right


@pytest.mark.slow
def test_tasks_with_what_is_recovered(pruned_llama, own_tasks, tmp_path, monkeypatch, capfd):
    """But no perplexity of a word is. And nothing but the results is on standard output, where the harness prints."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monitors = []

    def kept() -> progress.Monitor:
        monitors.append(progress.Monitor())
        return monitors[-1]

    monkeypatch.setattr("ria_vllm.offline.evaluation.evaluate.Monitor", kept)
    word = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " red",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    save_task(own_tasks, "words", [{"text": question["question"]} for question in QUESTIONS], word)
    out = shutil.copytree(pruned_llama.folder, tmp_path / "out")
    (out / "README.md").write_text("# Mine\n")
    arguments = [str(out), "--json", "--device", "cpu", "--update-card", "--tasks", "colours,words"]
    arguments += ["--include-path", str(own_tasks), "--baseline", str(pruned_llama.source)]
    evaluate.main(arguments, standalone_mode=False)
    found = json.loads(capfd.readouterr().out)
    assert list(monitors[0].seconds) == [
        "loading lm-evaluation-harness", "loading the model", "tasks for the model",
        "loading the baseline", "tasks for the baseline",
    ]  # fmt: skip
    assert found["examples"] == {"colours": 8, "words": 8}
    right, dense = (right_answers(folder, pruned_llama.source) for folder in (pruned_llama.folder, pruned_llama.source))
    assert math.isclose(found["tasks"]["colours"]["acc"], right / 8)
    assert math.isclose(found["baseline"]["tasks"]["colours"]["acc"], dense / 8)
    assert math.isclose(found["recovery"]["colours"]["acc"], 100 * right / dense)
    assert math.isclose(found["average"]["recovery"], 100 * right / dense)
    assert found["tasks"]["words"]["perplexity"] != found["baseline"]["tasks"]["words"]["perplexity"]
    assert found["recovery"]["words"] == {}
    rows = [line.split(" | ") for line in (out / "README.md").read_text().splitlines()]
    assert [row[-1] for row in rows if row[0] == "| colours"] == [f"{100 * right / dense:.1f}% |"]

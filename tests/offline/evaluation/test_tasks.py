"""`eval --tasks`: a task on both engines, the error without the harness, and which of its results are reported."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ria_vllm.errors import RiaError
from ria_vllm.offline.evaluation.evaluate import task_lines
from ria_vllm.offline.evaluation.tasks import numbers, run_tasks


def test_without_the_harness_the_message_says_how_to_get_it(monkeypatch, pruned_llama):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RiaError, match="pip install lm_eval"):
        run_tasks(str(pruned_llama.folder), ["arc_easy"], "hf", None, torch.device("cpu"))


def test_only_numbers_are_kept():
    metrics = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact,strict": 1, "flag": True}
    assert numbers(metrics) == {"acc": 0.5, "exact,strict": 1.0}


def test_lines_for_readers():
    assert task_lines({"tasks": {"arc": {"acc": 0.5}, "b": {"f1": 0.25}}}) == "arc: acc 0.5000\nb: f1 0.2500"


QUESTIONS = [{"question": f"item {i} is", "choices": [" red", " green", " blue"], "answer": i % 3} for i in range(8)]


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with the task `colours`, its examples in a local file."""
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "colours.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def right_answers(folder: Path, source: Path) -> int:
    """The number of questions whose right choice the pruned model finds most likely, in plain transformers."""
    from transformers import AutoTokenizer

    from ria_vllm.offline.model.hf import load_model

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
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_task_on_either_engine(pruned_llama, own_tasks, engine):
    command = [sys.executable, "-m", "ria_vllm", "eval", str(pruned_llama.folder), "--json", "--device", "cpu"]
    command += ["--tasks", "colours", "--include-path", str(own_tasks), "--engine", engine]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["engine"] == engine
    assert math.isclose(found["tasks"]["colours"]["acc"], right_answers(pruned_llama.folder, pruned_llama.source) / 8)

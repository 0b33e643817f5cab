"""`eval --tasks`: the message without the harness, and what is kept of its results."""

import sys

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.evaluate import task_lines
from ria_vllm.offline.tasks import numbers, run_tasks


def test_without_the_harness_the_message_says_how_to_get_it(monkeypatch, pruned_llama):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RiaError, match=r"pip install 'ria-vllm\[tasks\]'"):
        run_tasks(str(pruned_llama.folder), ["arc_easy"], "hf", None, torch.device("cpu"))


def test_only_numbers_are_kept():
    metrics = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact,strict": 1, "flag": True}
    assert numbers(metrics) == {"acc": 0.5, "exact,strict": 1.0}


def test_lines_for_readers():
    assert task_lines({"tasks": {"arc": {"acc": 0.5}, "b": {"f1": 0.25}}}) == "arc: acc 0.5000\nb: f1 0.2500"

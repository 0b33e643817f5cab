"""What the report of a load adds to vLLM's compile key."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from ria_vllm.formats import FLOAT, FORMATS
from ria_vllm.serve import load_report
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.choice import Choice
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.load_report import LoadReport


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(load_report, "get_tensor_model_parallel_rank", lambda: 0)


def load(*graphs, report=None):
    report = report or LoadReport()
    report.expected += len(graphs)
    for graph in graphs:
        report.add(["cpu"], 0, 0, 2, 1, graph)
    return report


def key(*models):
    """vLLM's compile key after these models were loaded in one process; each is the graphs of its layers."""
    config = VllmConfig()
    with set_current_vllm_config(config):
        for graphs in models:
            load(*graphs)
    return config.compute_hash()


def test_every_model_of_a_process_is_in_the_key():
    target, other, draft = ("a", "b"), ("a", "c"), ("d",)
    keys = [key(target), key(target, draft), key(other, draft), key(target, ("e",)), key(draft), key(target, target)]
    assert len(set(keys)) == len(keys)


def test_the_order_of_loading_does_not_matter():
    models = [("a", "b"), ("c",), ("d",)]
    assert key(*models) == key(*models[::-1]) == key(models[1], models[0], models[2])


def test_layers_that_come_later_replace_the_models_own_key():
    config, at_once = VllmConfig(), VllmConfig()
    with set_current_vllm_config(config):
        report = load("a")
        load("z")
        load("b", report=report)
    with set_current_vllm_config(at_once):
        load("z")
        load("a", "b")
    assert config.compute_hash() == at_once.compute_hash()


def test_a_layer_that_is_served_dense_is_in_the_key():
    keys = []
    for left_out in ("fc", "gc", None):
        config = VllmConfig()
        with set_current_vllm_config(config):
            report = LoadReport()
            if left_out:
                report.expected += 1
                report.leave_out(left_out, claims_24=True)
            load("a", report=report)
        keys.append(config.compute_hash())
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    "widened_from, unrounded, expected",
    [
        (None, None, []),
        ("int4-g64", None, ["Weights in int4-g64 are widened to bfloat16 2:4, because no kernel for cuda multiplies"]),
        (
            "int4-g64",
            torch.int8,
            ["Weights in int4-g64 are widened", "Inputs are not rounded to int8, because no fast"],
        ),
        (None, torch.int8, ["Inputs are not rounded to int8"]),
    ],
)
def test_what_a_kernel_does_not_do_is_said(monkeypatch, widened_from, unrounded, expected):
    said = []
    monkeypatch.setattr(load_report.logger, "warning_once", lambda words, *values: said.append(words % values))
    config = LinearLayerConfig(torch.device("cuda"), torch.bfloat16, FLOAT, 64, 64)
    LoadReport().warn_of_choice(Choice(CutlassKernel, config, widened_from and FORMATS[widened_from], unrounded))
    assert len(said) == len(expected) and all(words.startswith(start) for words, start in zip(said, expected))

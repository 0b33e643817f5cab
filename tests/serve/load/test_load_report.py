"""What the report of a load says, and adds to vLLM's compile key."""

import pytest
import torch
from compressed_tensors_layers import INT, Checkpoint
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear

from ria_vllm.format.formats import FLOAT, FORMATS
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.choice import Choice
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.load import load_report
from ria_vllm.serve.load.load_report import LoadReport


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.delenv(registry.KERNEL_VARIABLE, raising=False)
    monkeypatch.setattr(load_report, "get_tensor_model_parallel_rank", lambda: 0)


@pytest.fixture
def said(monkeypatch):
    words = []
    monkeypatch.setattr(load_report.logger, "warning_once", lambda text, *values: words.append(text % values))
    return words


def load(*graphs):
    report = LoadReport()
    for graph in graphs:
        report.add("cpu", 0, 0, 2, 1, graph)
    report.finish()


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


INT4, FP8_INPUTS = FORMATS["int4-g64"], torch.float8_e4m3fn


@pytest.mark.parametrize(
    "stored, kept, activations, applied, expected",
    [
        (FLOAT, FLOAT, None, None, []),
        (INT4, FLOAT, torch.int8, None, ["Weights in int4-g64 are widened", "Inputs are not rounded to int8, because"]),
        (INT4, INT4, FP8_INPUTS, None, ["Inputs are not rounded to float8_e4m3fn, because no fast kernel for cuda"]),
    ],
)
def test_what_a_kernel_does_not_do_is_said(said, stored, kept, activations, applied, expected):
    config = LinearLayerConfig(torch.device("cuda"), torch.bfloat16, kept, 64, 64, applied)
    load_report.warn_of_choice(Choice(CutlassKernel, config, None if stored == kept else stored), activations)
    assert len(said) == len(expected) and all(words.startswith(start) for words, start in zip(said, expected))


def test_a_slow_kernel_that_nobody_asked_for_is_said(said, monkeypatch):
    config = LinearLayerConfig(torch.device("cpu"), torch.bfloat16, FLOAT, 16, 100)
    choice = registry.choose(config)
    load_report.warn_of_choice(choice, None)
    assert choice.kernel is ReferenceKernel and len(said) == 1
    assert said[0].startswith("The kernel reference serves a 16 x 100 layer with float weights") and "doctor" in said[0]
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "reference")
    load_report.warn_of_choice(registry.choose(config), None)
    assert len(said) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_dense_layers_do_not_round_their_inputs_and_say_so(ranks, said, rank):
    """On any rank, because the weights of the others may be 2:4."""
    ranks(rank, 2)
    checkpoint = Checkpoint(weights=INT, inputs=INT | {"strategy": "token"}, dense=True)
    layer = ReplicatedLinear(128, 64, bias=False, quant_config=checkpoint.config(), prefix="fc", return_bias=False)
    LoadReport.of(checkpoint.load(layer, {"fc": (None, 64)}, two_of_four=False))
    assert said == [
        "Inputs are not rounded to int8, because fc and others like it are not 2:4 and served dense: the answers are "
        "those of weights in int8 alone."
    ]

"""What the workers of a running server answer when they are asked whether they compute what their files say."""

from types import SimpleNamespace

import pytest
import torch
from reload_model import FORMATS, Checkpoint
from reload_server import Server, watch
from vllm.config import get_current_vllm_config

from ria_vllm.serve.proving import served


@pytest.fixture
def ask(ranks, monkeypatch):
    watch(monkeypatch)
    server = Server.started(Checkpoint(FORMATS["float"], pruned_experts=True, tied=False), 1, monkeypatch)
    worker = SimpleNamespace(get_model=lambda: server.model, vllm_config=get_current_vllm_config())
    return server.model, lambda: served.prove(worker)


def test_a_sound_server(ask):
    """It has 21 matrices: gate, up, down, twelve of experts, q, k, o, a convolution, embedding and head."""
    checkpoint, _ = Server.read
    for _ in range(2):
        answer = ask[1]()
        assert answer == {"digest": checkpoint.schema().proofs.digest, "matrices": 21, "problem": None}


@pytest.mark.parametrize("name", ["block.gate_up.weight_packed", "embed.weight"])
def test_a_server_whose_memory_was_overwritten(ask, name):
    model, prove = ask
    tensor = model.get_parameter(name).data.view(torch.uint8).flatten()
    tensor[len(tensor) // 2 :] = 0
    assert "are not what the checkpoint says" in prove()["problem"]


def test_a_model_that_is_not_ours(engine):
    worker = SimpleNamespace(get_model=object, vllm_config=get_current_vllm_config())
    assert served.prove(worker) == {"digest": None, "matrices": 0, "problem": None}

"""Checkpoints that other programs wrote: proofs of them are made while they load, and refuse what goes wrong."""

import pytest
import torch
from compressed_tensors_layers import BY_TENSOR, FLOAT, INT
from compressed_tensors_layers import Checkpoint as Linears
from proved_model import FOREIGN, Foreign, Model
from proved_server import Server, watch

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.file_proofs import ROWS, FileProofs


@pytest.mark.parametrize("rows", [64, 300])
@pytest.mark.parametrize(
    "written",
    [
        {"weights": INT, "inputs": None},
        {"weights": FLOAT, "strategy": "tensor", "inputs": BY_TENSOR},
        {"weights": INT, "inputs": None, "dense": True, "strategy": "tensor"},
    ],
)
def test_some_rows_of_each_matrix_are_multiplied(rows, written):
    checkpoint = Linears(**written)
    config = checkpoint.config()
    stored = {f"fc.{part}": tensor for part, tensor in checkpoint.tensors("fc", rows, 128).items()}
    found = FileProofs({"fc": config.scheme("fc")}.get)
    for name, tensor in [*stored.items(), ("head.weight", torch.ones(3, 128)), ("norm.weight", torch.ones(128))]:
        found.see(name, tensor)
    r, (products, _) = found.vector(128), found.take()
    assert products.keys() == {"fc", "head"} and not any(found.take())
    known = ~products["fc"][:, 0].isnan()
    assert int(known.sum()) == (rows if rows <= ROWS else 100)  # every third of 300
    exact = checkpoint.plain["fc"] @ r.double()
    torch.testing.assert_close(products["fc"][known, 0].double(), exact[known], rtol=0, atol=1e-3)
    torch.testing.assert_close(products["head"][:, 0], r.sum().expand(3))


def test_damaged_tensors_are_left_to_the_layer():
    checkpoint = Linears(INT, None)
    found = FileProofs({"fc": checkpoint.config().scheme("fc")}.get)
    tensors = checkpoint.tensors("fc", 64, 128)
    for part, tensor in (tensors | {"bitmask": torch.full((64, 16), 7, dtype=torch.uint8)}).items():
        found.see(f"fc.{part}", tensor)
    for part, tensor in (tensors | {"compressed": tensors["compressed"][:, 1:]}).items():
        found.see(f"fc.{part}", tensor)
    assert not any(found.take())


@pytest.fixture
def watched(ranks, monkeypatch, caplog):
    watch(monkeypatch)
    caplog.set_level("INFO", logger="vllm.ria")


@pytest.mark.parametrize("form", FOREIGN)
def test_all_matrices_are_proved(watched, monkeypatch, caplog, form):
    Server.started(Foreign(form), 1, monkeypatch)
    assert "21 matrices compute what the checkpoint says (" in caplog.text and "without" not in caplog.text


@pytest.mark.parametrize("part", ["compressed", "bitmask"])
def test_a_model_that_changes_a_tensor_on_the_way_is_refused(watched, monkeypatch, part):
    load = Model.load_weights

    def load_weights(self, weights):
        return load(self, ((n, t.flip(0) if n.endswith(f"down.{part}") else t) for n, t in weights))

    monkeypatch.setattr(Model, "load_weights", load_weights)
    with pytest.raises(RiaError, match=r"model\.block\.down"):
        Server.started(Foreign(), 1, monkeypatch)


def test_a_model_that_confuses_linears_is_refused(watched, monkeypatch):
    load = Model.load_weights

    def load_weights(self, weights):
        swapped = {"gate": "up", "up": "gate"}
        names = ((name.split("."), tensor) for name, tensor in weights)
        return load(
            self, ((".".join(swapped.get(p, p) for p in n) if "block" in n else ".".join(n), t) for n, t in names)
        )

    monkeypatch.setattr(Model, "load_weights", load_weights)
    with pytest.raises(RiaError, match=r"model\.block\.gate, model\.block\.up"):
        Server.started(Foreign(), 1, monkeypatch)

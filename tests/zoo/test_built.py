"""MoE models that vLLM cannot run on CPUs: its layers take what `compress` writes, and its experts compute with it."""

import re
from collections import Counter

import pytest
import torch
from zoo.built import routed
from zoo.family import dense_folder, pruned_folders
from zoo.serving import serve
from zoo.toy import BASE
from zoo.toys import TOYS

from ria_vllm.checkpoint.reader import Reader

pytestmark = pytest.mark.slow

# vLLM's loader of DBRX does not know the names of its experts, which stay dense. The others have no experts.
LEFT_OUT = ("dbrx", "bamba", "olmo_hybrid", "youtu")
NAMES = [name for name, toy in TOYS.items() if toy.not_served and name not in LEFT_OUT]
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<kind>\w+)")
KINDS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Type -> what the compressed folder has, and what vLLM has made of it."""
    place = tmp_path_factory.mktemp("built")
    folders = []
    for name in NAMES:
        dense_folder(name, TOYS[name], place)
        folders.append(pruned_folders(name, TOYS[name], place)[0])
    jobs = [
        {"model": str(folder), "call": "load", "engine": {"dtype": TOYS[name].dtype}}
        for name, folder in zip(NAMES, folders, strict=True)
    ]
    results = serve(jobs, place / "vllm")
    return {name: (Reader(folder), result) for name, folder, result in zip(NAMES, folders, results, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_each_pruned_linear_has_one_layer(built, name):
    reader, found = built[name]
    assert "error" not in found, found
    experts = {linear for linear in reader.sparse_names if EXPERT.fullmatch(linear)}
    assert experts
    served = Counter(linear for linears in found["linears"].values() for linear in linears)
    assert served == Counter(set(reader.sparse_names) - experts)
    assert Counter(found["taken"]) == Counter(experts)


def expected(reader, experts, activate):
    """Float64 [T, hidden]: what the experts of this name give for `routed`."""
    matrices = {}
    for linear in reader.sparse_names:
        match = EXPERT.fullmatch(linear)
        if match and match["experts"] == experts:
            dense = reader.linear(linear).dense().double()
            matrices.setdefault(int(match["number"]), {})[KINDS[match["kind"]]] = dense
    x, weights, ids = routed(BASE["hidden_size"])
    x = x.to(next(iter(reader.dense_tensors().values()))().dtype).double()
    rows = []
    for token, shares, numbers in zip(x, weights.double(), ids.tolist(), strict=True):
        chosen = [matrices[number] for number in numbers]
        rows.append(sum(share * (one["down"] @ activate(one, token)) for share, one in zip(shares, chosen)))
    return torch.stack(rows)


def gated(expert, x):
    return torch.nn.functional.silu(expert["gate"] @ x) * (expert["up"] @ x)


def squared(expert, x):
    return (expert["up"] @ x).relu() ** 2


@pytest.mark.parametrize("name", NAMES)
def test_its_experts_compute_with_the_weights_of_the_files(built, name):
    reader, found = built[name]
    names = {match["experts"] for linear in reader.sparse_names if (match := EXPERT.fullmatch(linear))}
    assert found["experts"].keys() == names
    for experts, got in found["experts"].items():
        want = expected(reader, experts, squared if name == "nemotron_h_moe" else gated)
        assert want.std() > 0.3
        limit = 1e-4 if TOYS[name].dtype == "float32" else 0.05
        torch.testing.assert_close(torch.tensor(got).double(), want, rtol=0, atol=limit * want.std().item())

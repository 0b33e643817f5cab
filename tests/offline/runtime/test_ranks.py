"""Joining the processes of a torchrun. What they do together is tested in test_interruptions."""

import itertools
import random
from datetime import timedelta

import pytest
import torch

from ria_vllm.offline.runtime import ranks
from ria_vllm.offline.runtime.ranks import joined


@pytest.fixture
def started(monkeypatch) -> dict:
    """Make this the second of two processes on a machine with two GPUs; returns what was asked of torch."""
    asked: dict = {}
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, **more: asked.update(backend=backend, **more))
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: asked.update(left=True))
    return asked


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_a_process_takes_the_gpu_of_its_own_number(device, index, started):
    with joined(torch.device(device)) as joint:
        assert (joint.rank, joint.size) == (1, 2)
    assert started["device"] == index and "nccl" in started["backend"] and started["left"]


def test_ranks_wait_for_as_long_as_the_first_one_works_alone(started):
    with joined(torch.device("cpu")):
        pass
    assert started["backend"] == "gloo" and started["timeout"] >= timedelta(days=1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_jobs_are_divided_nearly_as_well_as_possible(size):
    """The most expensive jobs first is within 4/3 - 1/(3 size) of the best division (Graham, 1969)."""
    draw = random.Random(size)
    for _ in range(5):
        costs = [draw.randint(1, 20) for _ in range(7)]
        owners = [ranks.Ranks(rank, size).partition_by_cost(costs) for rank in range(size)]
        assert all(one == owners[0] for one in owners)  # all ranks agree without asking each other
        best = min(busiest(costs, division, size) for division in itertools.product(range(size), repeat=len(costs)))
        assert best <= busiest(costs, owners[0], size) <= best * (4 / 3 - 1 / (3 * size))


def busiest(costs, owners, size):
    return max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size))


@pytest.mark.parametrize(("jobs", "size"), [(5, 2), (6, 3), (2, 4)])
def test_shares_are_consecutive_and_of_nearly_the_same_length(jobs, size):
    shares = [ranks.Ranks(rank, size).share(jobs) for rank in range(size)]
    assert [job for share in shares for job in share] == list(range(jobs))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [ranks.Ranks(0, size).share(jobs, rank) for rank in range(size)] == shares

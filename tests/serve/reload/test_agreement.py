"""Ranks that decide together about a reload, as threads with a store."""

import itertools
import random
import threading
import time

import pytest
from torch.distributed import TCPStore

from ria_vllm.errors import RiaError
from ria_vllm.serve.reload import agreement
from ria_vllm.serve.reload.agreement import PROVED, SERVED, Agreement

RANKS = range(2, 5)  # the second engine
WAYS = ("serves", "refuses at once", "refuses what it has proved", "comes when the others have given up")


@pytest.fixture(scope="module")
def stores():
    """One of each rank."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [TCPStore("127.0.0.1", server.port, is_master=False) for _ in RANKS] + [server]


def reload(one, way, others, results):
    """As `Reloads` has it. Leaves whether this rank serves the new weights."""
    time.sleep(random.random() / 50)
    for thread in others:
        thread.join()
    try:
        if way == "refuses at once":
            raise RiaError("broken")
        one.reach(PROVED)
        if way == "refuses what it has proved":
            raise RiaError("another product")
        one.reach(SERVED)
    except RiaError:
        one.refuse()
        results[one.rank] = False
    else:
        one.leave()
        results[one.rank] = True


def test_one_refusal_is_that_of_all_and_nothing_is_left_in_the_store(stores, monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE", 5)
    before = stores[-1].num_keys()
    for ways in itertools.combinations_with_replacement(WAYS, len(RANKS)):
        results: dict[int, bool] = {}
        threads = []
        for rank, store, way in zip(RANKS, stores, ways, strict=False):  # those that come late are the last
            others = list(threads) if way == WAYS[-1] else []
            one = Agreement(f"reload {ways}", RANKS, rank, store)
            threads.append(threading.Thread(target=reload, args=(one, way, others, results)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        assert results == dict.fromkeys(RANKS, set(ways) == {"serves"}), (ways, results)
        assert stores[-1].num_keys() == before, ways


def test_one_rank_asks_nobody():
    one = Agreement.about(1, True, 1)
    one.reach(PROVED)
    one.refuse()

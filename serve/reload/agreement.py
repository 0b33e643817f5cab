"""What the ranks that serve a model together decide about a reload: none may serve what another has refused.

They tell each other through the store of their process group. Not by a barrier: after one that a rank has missed, a
group is of no use any more.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store
from vllm.distributed import get_tp_group

from ria_vllm.errors import RiaError

# Seconds that a rank waits for others when it has its new weights.
PATIENCE = 300
# What ranks decide: to compare what they have with proofs, for which they add up products; and to serve it.
PROVED, SERVED = STAGES = ("proved", "served")
WAY_OUT = "Reload or send all weights of one model, or start the server again."


class Agreement:
    """About one reload, as one rank has it.

    Args:
        name: of the reload, the same on all ranks.
        ranks: those that serve the model together.
        rank: this one.
        store: by which they tell each other; None if there is only one.
    """

    def __init__(self, name: str, ranks: Sequence[int], rank: int, store: Store | None):
        self.name, self.ranks, self.rank, self.store = name, ranks, rank, store

    @classmethod
    def about(cls, number: int, embeddings: bool, ranks_of_engine: int) -> "Agreement":
        """About the reload with this number of a model, or of a draft without embeddings of its own, which may be on
        the last stage of a pipeline only."""
        if not torch.distributed.is_initialized():
            return cls("", [0], 0, None)
        rank = torch.distributed.get_rank()
        first = rank // ranks_of_engine * ranks_of_engine
        ranks = range(first, first + ranks_of_engine) if embeddings else get_tp_group().ranks
        store = _get_default_store() if len(ranks) > 1 else None
        return cls(f"ria-vllm {embeddings} {ranks[0]}/{number}", ranks, rank, store)

    def reach(self, stage: str) -> None:
        """Wait until all ranks have got as far as this one.

        Raises:
            RiaError: one has not.
        """
        if self.store is None:
            return
        self.store.set(self._here(stage, self.rank), "")
        decision = "served"
        try:
            self.store.wait([self._here(stage, rank) for rank in self.ranks], timedelta(seconds=PATIENCE))
        except RuntimeError:
            decision = "refused"
        # The first decision counts.
        if self.store.compare_set(self._decision(stage), "", decision) != b"served":
            raise RiaError(
                f"another rank has refused this reload, or takes more than {PATIENCE} seconds longer. {WAY_OUT}"
            )

    def is_refused(self) -> bool:
        """Whether some rank has refused it."""
        store = self.store
        said = map(self._decision, STAGES)
        return store is not None and any(store.check([key]) and store.get(key) == b"refused" for key in said)

    def refuse(self) -> None:
        """Have the others refuse the reload, too. Then `leave`."""
        if self.store is not None:
            for stage in STAGES:
                self.store.compare_set(self._decision(stage), "", "refused")
                self.store.set(self._here(stage, self.rank), "")
        self.leave()

    def leave(self) -> None:
        """This rank asks no more. The last one that does so deletes what they have told each other."""
        count = f"{self.name}/left"
        if self.store is None or self.store.add(count, 1) < len(self.ranks):
            return
        said = [self._here(stage, rank) for stage in STAGES for rank in self.ranks]
        for key in (*said, *map(self._decision, STAGES), count):
            self.store.delete_key(key)

    def _decision(self, stage: str) -> str:
        return f"{self.name}/{stage}"

    def _here(self, stage: str, rank: int) -> str:
        return f"{self.name}/{stage}/{rank}"

"""What the experts of a layer read, and which tokens its router sends to each of them."""

from collections.abc import Iterator

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.activations import Activations
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.experts.run import set_watcher
from ria_vllm.offline.model.run.layer_call import Reached


class Reads:
    """What the experts at one place read, for each chunk of one stream.

    inputs: [tokens, width] each.
    choices: int16 [tokens, top_k] each: the experts that a token goes to.
    """

    def __init__(self, like: Activations):
        self.inputs = Activations(None, like.stored_dtype)
        self.choices = Activations()

    def __len__(self) -> int:
        return len(self.inputs)

    def remove(self) -> None:
        """Free the memory that they take."""
        for kept in (self.inputs, self.choices):
            kept.remove()


def read_by(experts: nn.Module, sublayer_pass: SublayerPass, stream: Activations, reads: Reads, place: str) -> None:
    """Run a stream through a sublayer until it reaches the experts.

    Args:
        experts: the module, in the sublayer.
        stream: one of the two before the sublayer.
        reads: empty; what they read is added here.
        place: what an error begins with.

    Raises:
        RiaError: the sublayer does not reach them.
    """

    def watch(X: torch.Tensor, choices: torch.Tensor) -> None:
        reads.inputs.append(X.reshape(-1, X.shape[-1]))
        reads.choices.append(choices.reshape(-1, choices.shape[-1]).to(torch.int16))
        raise Reached

    fitted = sublayer_pass.streams.fitted
    set_watcher(experts, watch)
    try:
        for index in sublayer_pass.monitor.steps(fitted, "calibration passes", len(fitted)):
            try:
                sublayer_pass.run(stream, index)
            except Reached:
                continue
            raise RiaError(f"{place}: not used in this layer, but in others like it. Leave them dense by --ignore.")
    finally:
        set_watcher(experts, None)


class RoutedTokens:
    """The tokens from which the statistics of each expert are taken.

    These are the tokens that the router sends to it. An expert that gets fewer than `enough` also takes tokens that
    went to others, evenly spread over all of them, until there are that many: it leans on what the layer's experts read
    on average. Which ones does not depend on the order of the chunks.

    Args:
        pruned: what the experts read in the pruned model, and their choices, which are followed.
        dense: what the same tokens are in the dense model; None: it is not followed.
        enough: so many tokens suffice; the width of what the widest linear reads.

    Attributes:
        tokens: how many there are in all.
        counts: how many go to each expert.
    """

    def __init__(self, pruned: Reads, dense: Reads | None, enough: int, num_experts: int):
        self.pruned, self.dense, self.enough = pruned, dense, enough
        choices = torch.cat([pruned.choices[index] for index in range(len(pruned))])
        self.tokens = len(choices)
        # One more place, for choices that mean no expert.
        counts = torch.bincount(choices.flatten().long().clamp(max=num_experts), minlength=num_experts + 1)
        self.counts = counts[:num_experts].tolist()

    def missing(self, expert: int) -> int:
        """How many tokens the expert lacks, and so takes of those that went to others."""
        return max(0, min(self.enough, self.tokens) - self.counts[expert])

    def of(self, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Chunks of what the expert reads [tokens, width] float32 in the pruned model, and in the dense one."""
        for index in range(len(self.pruned)):
            chosen = self._chosen(index, expert)
            if bool(chosen.any()):
                dense = None if self.dense is None else self.dense.inputs[index][chosen].float()
                yield self.pruned.inputs[index][chosen].float(), dense

    def _chosen(self, index: int, expert: int) -> torch.Tensor:
        """bool [tokens]: which tokens of a chunk the expert reads, those of others that it takes included."""
        choices = self.pruned.choices[index]
        chosen = (choices == expert).any(1)
        others = torch.where(~chosen)[0]
        share = -(-self.missing(expert) * len(choices) // self.tokens)  # rounded up
        taken = min(share, len(others))
        chosen[others[torch.arange(taken) * len(others) // max(taken, 1)]] = True
        return chosen

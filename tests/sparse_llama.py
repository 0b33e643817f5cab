"""A tiny pruned Llama to train, and what every training of it must leave alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import ria_vllm  # noqa: F401  (teaches from_pretrained to read it)
from ria_vllm.checkpoint.reader import Reader

TOKENS = torch.randint(3, 250, (8, 24), generator=torch.Generator().manual_seed(0))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def masks(folder: Path) -> dict[str, torch.Tensor]:
    """Parameter -> bool [out, in], True where a weight is kept; by definition, one bit after the other."""
    reader = Reader(folder)
    found = {}
    for name in reader.sparse_names:
        bitmask = reader.tensor(f"{name}.bitmask")
        stored = torch.stack([bitmask >> i & 1 for i in range(8)], -1).flatten(1).bool()
        p = reader.permutations.get(name, torch.arange(stored.shape[1])).long()
        mask = torch.zeros_like(stored)
        mask[:, p] = stored
        found[f"{name}.weight"] = mask
    return found


def loss_of(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    logits = model(tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, after: Callable[[], None] = lambda: None
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, TOKENS[step : step + 4]).backward()
        optimizer.step()
        after()


def outside(model: torch.nn.Module, kept: dict[str, torch.Tensor]) -> Iterator[str]:
    """The pruned weights that are not zero outside the mask."""
    for name, mask in kept.items():
        if bool((model.get_parameter(name)[~mask] != 0).any()):
            yield name

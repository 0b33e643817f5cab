"""What config.json says of groups of linears: which rows absorb a permutation (`Fold`), and how experts are stored.

Names are patterns: `{i}` stands for a layer's number, `{e}` for an expert's.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ria_vllm.format.permutation import head_rows

PLACEHOLDERS = ("{i}", "{e}")


def _placeholders(pattern: str) -> frozenset[str]:
    """Those in a pattern.

    Raises:
        ValueError: one of them twice, or both without anything between.
    """
    if any(pattern.count(placeholder) > 1 for placeholder in PLACEHOLDERS) or "}{" in pattern:
        raise ValueError(f"{pattern[:80]!r}: {{i}} and {{e}} stand in a name at most once, and not side by side")
    return frozenset(placeholder for placeholder in PLACEHOLDERS if placeholder in pattern)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{([ie])\}", pattern)
    literal, names = parts[::2], parts[1::2]
    return re.compile(
        re.escape(literal[0]) + "".join(f"(?P<{n}>[0-9]{{1,9}}){re.escape(t)}" for n, t in zip(names, literal[1:]))
    )


def numbers_in(pattern: str, name: str) -> dict[str, str] | None:
    """What stands in `name` for the placeholders of `pattern`, such as {"i": "3"}; None if it does not match."""
    found = _compiled(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


def filled(pattern: str, numbers: Mapping[str, str]) -> str:
    """The pattern with these numbers in the place of its placeholders."""
    for placeholder, number in numbers.items():
        pattern = pattern.replace(f"{{{placeholder}}}", number)
    return pattern


class Producer(BaseModel):
    """A linear whose output feeds a consumer: all of its rows, or rows [start, end) of a fused one.

    blocks: the linear's rows make this many equal blocks, and `rows` are those of each block. GPT-NeoX, for example,
        stores q, k and v head by head.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    rows: tuple[int, int] | None = None
    blocks: int = Field(default=1, gt=0, le=1 << 20)

    @model_validator(mode="after")
    def _rows_of_blocks(self) -> "Producer":
        if self.rows is None and self.blocks > 1:
            raise ValueError("blocks without the rows of each block")
        return self

    @property
    def count(self) -> int | None:
        """How many rows it gives; None: all that the linear has."""
        return None if self.rows is None else (self.rows[1] - self.rows[0]) * self.blocks


class Stacked(BaseModel):
    """A tensor of the dense model that stacks one or two linears of all experts, which a checkpoint stores apart.

    The tensor is [experts, out, in], or [experts, in, out] if `transposed`. If it holds two linears, their outputs
    follow each other, or alternate if `interleaved`.

    tensor: its name in the dense model's files, with `{i}` for the layer's number.
    bias: the name of the biases [experts, out], which are stored as in the dense model; None: there are none.
    linears: of `Experts`, in the order of their outputs.
    """

    model_config = ConfigDict(extra="forbid")
    tensor: str
    bias: str | None = None
    linears: list[Literal["gate", "up", "down"]] = Field(min_length=1, max_length=2)
    interleaved: bool = False
    transposed: bool = False


class Experts(BaseModel):
    """The routed experts of MoE layers `{i}`, whose linears are stored one by one: `{e}` is the expert's number.

    gate, up, down: names of an expert's linears, `{module}.{e}.` and more; gate is None if the experts have none.
    stacked: the tensors in which the dense model's files have these linears, each in one; empty if they are apart
        there, too.
    """

    model_config = ConfigDict(extra="forbid")
    module: str
    num_experts: int = Field(gt=0)
    gate: str | None = None
    up: str
    down: str
    stacked: list[Stacked] = Field(default=[], max_length=3)

    @model_validator(mode="after")
    def _numbered(self) -> "Experts":
        layer = _placeholders(self.module)
        stacked = [name for stack in self.stacked for name in (stack.tensor, stack.bias) if name is not None]
        if layer - {"{i}"} or any(_placeholders(name) != layer for name in stacked):
            raise ValueError("{i} stands in the name of the experts and of each stacked tensor, or in none of them")
        if len(set(stacked)) < len(stacked):
            raise ValueError("two stacked tensors have one name")
        inside = [kind for stack in self.stacked for kind in stack.linears]
        if self.stacked and sorted(inside) != sorted(self.linears):
            raise ValueError(f"{', '.join(inside)} are stacked, but an expert has {', '.join(self.linears)}")
        for name in self.linears.values():
            if not name.startswith(f"{self.module}.{{e}}.") or _placeholders(name) != layer | {"{e}"}:
                raise ValueError(
                    f"{name[:80]!r}: the name of an expert's linear begins with that of the experts and {{e}}"
                )
        return self

    @property
    def linears(self) -> dict[str, str]:
        """gate, up and down, as far as the experts have them -> the pattern of their names."""
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {kind: name for kind, name in found.items() if name is not None}


class Fold(BaseModel):
    """A consumer's input permutation that its producers' rows can absorb, for all layers `{i}`.

    `{i}` stands once in the consumer's name and once in each producer's, or in none of them. The same goes for `{e}`,
    the number of an expert.

    `elementwise`: each input channel of the consumer is an elementwise function of the same row of every producer.
    `heads`: attention lies between; the permutation keeps to heads (`ria_vllm.format.permutation.head_rows`). A
    producer with as many `rows` as the consumer has channels, such as a gate on attention's output, takes the
    permutation itself.
    """

    model_config = ConfigDict(extra="forbid")
    consumer: str
    producers: list[Producer] = Field(min_length=1)
    coupling: Literal["elementwise", "heads"]
    num_heads: int | None = Field(default=None, gt=0)
    num_kv_heads: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _same_numbers(self) -> "Fold":
        placeholders = _placeholders(self.consumer)
        if any(_placeholders(producer.name) != placeholders for producer in self.producers):
            raise ValueError("{i} and {e} stand once in the consumer's name and in each producer's, or in none of them")
        return self

    def numbers(self, name: str) -> dict[str, str] | None:
        """What stands for the placeholders in the consumer `name`; None if it is another linear."""
        return numbers_in(self.consumer, name)

    def producers_of(self, name: str) -> list[Producer]:
        """The producers of the consumer `name`, with its numbers filled in."""
        numbers = self.numbers(name) or {}
        return [p.model_copy(update={"name": filled(p.name, numbers)}) for p in self.producers]

    def row_permutations(self, p: torch.Tensor) -> list[torch.Tensor]:
        """The permutation of the rows that each producer gives, if that of the consumer's input channels is `p`.

        Args:
            p: int [in], a permutation.

        Returns:
            One int64 tensor for each producer: row j of the permuted rows is row result[j] of those it gives.

        Raises:
            ValueError: `p` lacks the structure that the coupling needs.
        """
        p = p.long()
        if self.coupling == "elementwise":
            return [p] * len(self.producers)
        rows = head_rows(p, self.num_heads or 0, self.num_kv_heads or 0)
        return [p if producer.count == len(p) else rows for producer in self.producers]

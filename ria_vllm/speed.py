"""How fast a pruned model should be served, against the dense one: an estimate from measured products."""

import importlib
from dataclasses import dataclass

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import Pattern

# Instruction set -> scheme -> how many times as fast as vLLM's fastest dense product in floating point a linear is with
# one token, and with eight. Medians of docs/lab/kernels-cpu.md; dense W8A8 with AMX by its bytes.
RATIOS: dict[str, dict[str, tuple[float, float]]] = {
    "amx": {
        "dense W8A8": (1.9, 1.8), "BF16": (2.0, 1.65), "W8A16": (3.0, 1.8), "W8A8": (3.2, 2.5), "W4A16": (3.8, 2.8),
        "W4A8": (4.5, 3.2),
    },
    "avx512_bf16": {
        "dense W8A8": (1.75, 1.55), "BF16": (2.4, 2.1), "W8A16": (3.5, 1.8), "W8A8": (4.2, 3.3), "W4A16": (7.0, 2.1),
        "W4A8": (6.2, 3.4),
    },
    "avx512_vnni": {
        "dense W8A8": (2.8, 2.4), "BF16": (3.3, 2.2), "W8A16": (5.0, 2.2), "W8A8": (6.4, 4.7), "W4A16": (7.0, 2.2),
        "W4A8": (10.0, 6.5),
    },
    "avx2": {
        "dense W8A8": (0.2, 0.3), "BF16": (2.0, 1.7), "W8A16": (2.5, 2.0), "W8A8": (4.8, 4.0), "W4A16": (3.5, 1.8),
        "W4A8": (6.5, 4.2),
    },
}  # fmt: skip
USERS = (1, 8)
# Milliseconds to read a dense weight in 16 bits, and those of a layer besides its products, and with each user more:
# SmolLM2 on two cores of a Zen 5, docs/lab/rivals.md.
WEIGHT, LAYER, LAYER_OF_USER = 6e-8, 0.3, 0.05
INT8_HEAD = 2.0


@dataclass(frozen=True)
class Sizes:
    """Weights that each token multiplies: of the pruned linears, of the head, and of what else stays dense."""

    layers: int
    pruned: float
    head: int
    dense: float


def served_by(scheme: str, pattern: Pattern, dtype: torch.dtype, place: torch.device) -> tuple[str, str | None]:
    """The kernel that serves linears here, and the instruction set that it runs; None on a GPU.

    Raises:
        RiaError: none can.
    """
    # Whoever prunes must not depend on what serves: the name is looked up, as the command line does.
    return importlib.import_module("ria_vllm.serve.doctor").served_by(scheme, pattern, dtype, place)


def expected(sizes: Sizes, scheme: str, instructions: str | None) -> str:
    """How many times the tokens a second of the dense model, and of dense W8A8; empty where nothing was measured."""
    table = RATIOS.get({"avx512": "avx512_vnni", "avx_vnni": "avx2"}.get(str(instructions), str(instructions)))
    if table is None:
        return ""
    found = []
    for number, users in enumerate(USERS):
        rest = sizes.layers * (LAYER + LAYER_OF_USER * users) + WEIGHT * (sizes.dense + sizes.head)
        saved = WEIGHT * sizes.head * (1 - 1 / INT8_HEAD) if scheme.endswith("A8") else 0.0
        ours = rest - saved + WEIGHT * sizes.pruned / table[scheme][number]
        dense, w8a8 = (rest + WEIGHT * sizes.pruned / ratio for ratio in (1.0, table["dense W8A8"][number]))
        who = "1 user" if users == 1 else f"{users} users"
        found.append(f"{who}: {dense / ours:.1f} times dense, {w8a8 / ours:.1f} times dense W8A8")
    return "; ".join(found)


def expected_here(sizes: Sizes, scheme: str, pattern: Pattern, dtype: torch.dtype, place: torch.device) -> str:
    """The same of linears that are served where this runs; empty, too, if no kernel can."""
    try:
        return expected(sizes, scheme, served_by(scheme, pattern, dtype, place)[1])
    except RiaError:
        return ""

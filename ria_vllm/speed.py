"""How fast a pruned model should be served, against the dense one: an estimate from measured products."""

import importlib
from dataclasses import dataclass, replace

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern

# Instruction set -> how many times as fast as vLLM's fastest dense product in floating point linears are, by WAYS, with
# one token, and with eight. Medians of docs/lab/kernels-cpu.md; dense W8A8 with AMX by its bytes.
WAYS = ("dense W8A8", "BF16", "W8A16", "W8A8", "W4A16", "W4A8")
RATIOS = {
    "amx": ((1.9, 2.0, 3.0, 3.2, 3.8, 4.5), (1.8, 1.65, 1.8, 2.5, 2.8, 3.2)),
    "avx512_bf16": ((1.75, 2.4, 3.5, 4.2, 7.0, 6.2), (1.55, 2.1, 1.8, 3.3, 2.1, 3.4)),
    "avx512_vnni": ((2.8, 3.3, 5.0, 6.4, 7.0, 10.0), (2.4, 2.2, 2.2, 4.7, 2.2, 6.5)),
    "avx2": ((0.2, 2.0, 2.5, 4.8, 3.5, 6.5), (0.3, 1.7, 2.0, 4.0, 1.8, 4.2)),
}
# 2:4's time / 8:16's with one to eight tokens, the least and the most: with inputs in 8 bits, and in 16. The same file.
EIGHT = {
    "amx": ((0.85, 0.99), (0.78, 0.98)),
    "avx512_bf16": ((0.56, 1.44), (0.49, 0.96)),
    "avx512_vnni": ((0.78, 0.99), (0.57, 0.84)),
    "avx2": ((0.56, 0.82), (0.43, 0.78)),
}
BF16 = ("amx", "avx512_bf16")  # other inputs of 16 or 32 bits are not for these instructions
ALIKE = {"avx512": "avx512_vnni", "avx_vnni": "avx2"}
EIGHT_BRINGS = (
    "`ria-vllm compress --pattern 8:16`, for CPUs only, is as large and loses less: of SmolLM2 in W8A8 28% less in KL"
)
USERS = (1, 8)
# Milliseconds to read a dense weight in 16 bits, and those of a layer besides its products, and with each user more:
# SmolLM2 on two cores of a Zen 5, docs/lab/rivals.md.
WEIGHT, LAYER, LAYER_OF_USER = 6e-8, 0.3, 0.05
INT8_HEAD = 2.0


@dataclass(frozen=True)
class Sizes:
    """Weights that each token multiplies: of the pruned linears, of the head, of what else stays dense, and of what
    stays dense in int8."""

    layers: int
    pruned: float
    head: int
    dense: float
    int8: float = 0

    def unpruned(self, in_int8: bool) -> "Sizes":
        """Those of a model in which all that is pruned stays dense, in int8 or in 16 bits."""
        if in_int8:
            return replace(self, pruned=0, int8=self.int8 + self.pruned)
        return replace(self, pruned=0, dense=self.dense + self.pruned)


def served_by(scheme: str, pattern: Pattern, dtype: torch.dtype, place: torch.device) -> tuple[str, str | None]:
    """The kernel that serves linears here, and the instruction set that it runs; None on a GPU.

    Raises:
        RiaError: none can.
    """
    # Whoever prunes must not depend on what serves: the name is looked up, as the command line does.
    return importlib.import_module("ria_vllm.serve.doctor").served_by(scheme, pattern, dtype, place)


def steps(sizes: Sizes, instructions: str | None, users: int) -> dict[str, float]:
    """The dense model, dense W8A8, or a scheme -> milliseconds of a step of decoding for `users`, one of USERS.

    instructions: as `measured` returns them. Empty where nothing was measured. CPUs serve FP8 in 16 bits, as BF16.
    """
    if instructions not in RATIOS:
        return {}
    ratios = {"dense": 1.0} | dict(zip(WAYS, RATIOS[instructions][USERS.index(users)], strict=True))
    ratios["FP8"] = ratios["BF16"]
    rest, found = sizes.layers * (LAYER + LAYER_OF_USER * users) + WEIGHT * sizes.dense, {}
    for way, ratio in ratios.items():
        ours = not way.startswith("dense")
        int8 = max(INT8_HEAD, ratios["dense W8A8"]) if ours else ratio
        head = INT8_HEAD if way.startswith("W") else 1.0  # all that have integers
        found[way] = rest + WEIGHT * (sizes.pruned / ratio + sizes.int8 / int8 + sizes.head / head)
    return found


def expected(sizes: Sizes, scheme: str, instructions: str | None) -> str:
    """How many times the tokens a second of the dense model, and of dense W8A8; empty where nothing was measured."""
    found = []
    for users in USERS:
        if of := steps(sizes, instructions, users):
            dense, w8a8 = of["dense"] / of[scheme], of["dense W8A8"] / of[scheme]
            who = "1 user" if users == 1 else f"{users} users"
            found.append(f"{who}: {dense:.1f} times dense, {w8a8:.1f} times dense W8A8")
    return "; ".join(found)


def of_eight(inputs: torch.dtype | None, instructions: str | None) -> str:
    """How fast linears of 8:16, or 4:8, that read `inputs` are on a CPU; empty where that was not measured."""
    runs = "avx512" if instructions in BF16 and inputs not in (torch.int8, torch.bfloat16) else str(instructions)
    measured = EIGHT.get(ALIKE.get(runs, runs))
    if measured is None or inputs is None:
        return ""
    least, most = measured[inputs != torch.int8]
    return f"linears at {least} to {most} times the speed of 2:4 with 1 to 8 users"


def measured(instructions: str | None, scheme: str, dtype: torch.dtype) -> str | None:
    """The instructions of RATIOS that linears with inputs of this dtype run at the speed of; None if not measured.

    Args:
        instructions: that the kernel of the scheme chooses on a machine.
    """
    if instructions in BF16 and dtype != torch.bfloat16 and not scheme.endswith("A8"):
        return "avx512_vnni"
    found = ALIKE.get(str(instructions), str(instructions))
    return found if found in RATIOS else None


def measured_here(scheme: str, pattern: Pattern, dtype: torch.dtype, place: torch.device) -> str | None:
    """The instruction set, of RATIOS, that serves linears where this runs; None if none does, or not at a speed that
    is known."""
    if pattern != TWO_OF_FOUR:
        return None  # see `of_eight`: what that makes of a step depends on the model
    try:
        return measured(served_by(scheme, pattern, dtype, place)[1], scheme, dtype)
    except RiaError:
        return None


def eight_here(scheme: str, pattern: Pattern, dtype: torch.dtype, place: torch.device) -> str:
    """What `of_eight` says where this runs; empty if nothing serves the scheme in the pattern."""
    inputs = None if scheme == "FP8" else torch.int8 if scheme.endswith("A8") else dtype
    try:
        return of_eight(inputs, served_by(scheme, pattern, dtype, place)[1])
    except RiaError:
        return ""


def expected_here(sizes: Sizes, scheme: str, pattern: Pattern, dtype: torch.dtype, place: torch.device) -> str:
    """What is `expected` where this runs, in a sentence; of another pattern than 2:4, how its linears compare."""
    if pattern != TWO_OF_FOUR:
        eight = eight_here(scheme, pattern, dtype, place)
        return eight and f"on this CPU, {eight}"
    instructions = measured_here(scheme, pattern, dtype, place)
    found = expected(sizes, scheme, instructions)
    return found and f"tokens/s on CPUs with {instructions}, estimated: {found}"

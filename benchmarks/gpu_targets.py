"""What the GPU kernels are to reach, beside what was measured. Part of gpu_session."""

from collections.abc import Callable, Sequence

from benchmarks.gpu_timing import Row

# (what, least speedup, most it can be, whether a number of tokens is meant). A 2:4 weight takes 9 of 16 bits in bf16
# and 5 of 8 in fp8. With many tokens, sparse tensor cores do at most twice the work of dense ones.
_SPEEDUPS: tuple[tuple[str, float, dict[str, float], Callable[[int], bool]], ...] = (
    ("up to 64 tokens", 1.5, {"cutlass": 16 / 9, "cutlass fp8": 8 / 5}, lambda tokens: tokens <= 64),
    ("1024 tokens and more", 1.3, {"cutlass": 2.0, "cutlass fp8": 2.0}, lambda tokens: tokens >= 1024),
    ("any number of tokens", 1.0, {"cutlass": 2.0, "cutlass fp8": 2.0}, lambda tokens: True),
)
_DENSE = {"cutlass": "torch's dense bf16", "cutlass fp8": "torch's dense fp8"}


def judge(times: Sequence[Row], decode: Sequence[Row]) -> list[Row]:
    """A row for each target, with the worst measurement: {"target", "wanted", "measured", "where", "met"}. The last
    three are None if nothing was measured.

    Args:
        times: gpu_check's rows of that section.
        decode: gpu_session's rows with times.
    """
    found = []
    for kernel, dense in _DENSE.items():
        speedups = _speedups(times, kernel)
        for what, wanted, most, meant in _SPEEDUPS:
            text = f"{kernel} against {dense}, {what} (at most {most[kernel]:.2f}x)"
            found.append(_judged(text, wanted, [(s, where) for s, where, tokens in speedups if meant(tokens)]))
    steps = [(row["dense_us"] / row["us"], _step(row)) for row in decode if "us" in row]
    found.append(_judged("a decoder layer and whole models against dense ones", 1.0, steps))
    return found


def _step(row: Row) -> str:
    return f"{row['model']}, {row['tokens']} tokens" + (" (not compiled)" if row["not_compiled"] else "")


def _speedups(times: Sequence[Row], kernel: str) -> list[tuple[float, str, int]]:
    """(speedup over the dense product of the same operands, where, tokens)."""

    def product(row: Row) -> tuple[int, int, int]:
        return row["out_features"], row["in_features"], row["tokens"]

    dense_fp8 = {product(row): row["us"] for row in times if row.get("kernel") == "dense fp8"}
    found = []
    for row in times:
        if row.get("kernel") == kernel and "us" in row:
            dense = dense_fp8.get(product(row)) if kernel == "cutlass fp8" else row["dense_us"]
            if dense is not None:
                where = f"{row['out_features']} x {row['in_features']}, {row['tokens']} tokens"
                found.append((dense / row["us"], where, row["tokens"]))
    return found


def _judged(text: str, wanted: float, measured: Sequence[tuple[float, str]]) -> Row:
    row: Row = {"target": text, "wanted": wanted, "measured": None, "where": None, "met": None}
    if not measured:
        return row
    worst, where = min(measured)
    return row | {"measured": worst, "where": where, "met": worst >= wanted}


def line(row: Row) -> str:
    """A row of `judge` as text."""
    if row["met"] is None:
        return f"not measured: {row['target']}: {row['wanted']:.1f}x"
    verdict = "met" if row["met"] else "MISSED"
    return f"{verdict}: {row['target']}: {row['wanted']:.1f}x wanted, {row['measured']:.2f}x at worst ({row['where']})"

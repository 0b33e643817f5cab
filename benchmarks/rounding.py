"""What each part of rounding to integers is worth: `python -m benchmarks.rounding MODEL --data TEXT`.

Prunes the first decoder layer, and prints for each of its linears how much larger the squared error of its output is
than that of the unrounded 2:4 weights from ADMM, in percent: for plain rounding, for scales by error, for a sweep that
corrects later columns as GPTQ and SparseGPT do, and for coordinate descent.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from ria_vllm.format.formats import INTEGERS, IntFormat
from ria_vllm.offline.pruning.admm import DAMPING
from ria_vllm.offline.pruning.rounding import Objective, nearest_scales, round_on_mask
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import layers
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor


class _Captured(Exception):
    """The layer is there; nothing more has to be pruned."""


def sweep(
    target: torch.Tensor, A: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor, weight_format: IntFormat
) -> torch.Tensor:
    """GPTQ on a mask: from the best unpruned weights, each column is rounded or pruned; later ones make up for it.

    Args:
        target: b [out, in]; A: [in, in], the damped Gram matrix; scales: [out, in].
    """
    inverse = torch.linalg.inv(A.double())
    W = (target.double() @ inverse).float()
    R = torch.linalg.cholesky(inverse, upper=True).float()
    for j in range(len(A)):
        rounded = (W[:, j] / scales[:, j]).round().clamp(weight_format.smallest, weight_format.largest) * scales[:, j]
        error = (W[:, j] - rounded * mask[:, j]) / R[j, j]
        W[:, j:] -= error[:, None] * R[j, j:]
        W[:, j] = rounded * mask[:, j]
    return W


def ways(problem: dict[str, Any], f: IntFormat) -> dict[str, float]:
    """How much larger the squared error is than without rounding, by way. All columns are in the stored order."""
    W, V, mask, gram, cross_term = (problem[key] for key in ("weight", "solved", "mask", "gram", "cross_term"))
    A = gram.dense()
    target = W @ A + cross_term

    def lost(Q: torch.Tensor) -> float:
        # Up to what does not depend on Q.
        D = Q.float() - W
        return problem["residual"] + float(((D @ A - 2 * cross_term) * D).sum(dtype=torch.float64))

    damped = A + DAMPING * A.diagonal().mean() * torch.eye(len(A))
    target += W @ (damped - A)
    fitting, searched = f.scales_of(V), nearest_scales(V, f, damped.diagonal())
    wide = searched.float().repeat_interleave(V.shape[1] // searched.shape[1], 1)

    def descent(passes: int) -> torch.Tensor:
        return round_on_mask(W, V.clone(), mask, Objective(gram, cross_term), f, passes=passes)[0]

    results: dict[str, Callable[[], torch.Tensor]] = {
        "nearest, scales by the largest magnitude": lambda: f.quantize(V, torch.float32, fitting)[0],
        "nearest, scales by error": lambda: f.quantize(V, torch.float32, searched)[0],
        "a sweep like GPTQ's, scales by error": lambda: sweep(target, damped, mask, wide, f),
        "coordinate descent, 1 pass": lambda: descent(1),
        "coordinate descent, 3 passes": lambda: descent(3),
        "coordinate descent, 6 passes": lambda: descent(6),
    }
    exact = lost(V)
    return {name: 100 * (lost(make()) / exact - 1) for name, make in results.items()}


def capture(model: str, calibration: str, samples: int, seq_len: int) -> dict[str, dict[str, Any]]:
    """Linear of the first layer -> its problem, columns in the stored order."""
    found: dict[str, dict[str, Any]] = {}
    solve = layers.solve

    def watched(linears: Any, *others: Any) -> Any:
        solved = solve(linears, *others)
        for name, linear in linears.items():
            p, stats = solved[name].p, linear.statistics
            p = torch.arange(linear.weight.shape[1]) if p is None else p
            W = linear.weight.float()
            cross_term = stats.drift.cross_term(linear.weight)
            found[name] = {
                "weight": W[:, p],
                "solved": solved[name].weight.float()[:, p],
                "mask": solved[name].mask[:, p],
                "gram": type(stats.gram).of(stats.gram.dense(p)),
                "cross_term": cross_term[:, p],
                "residual": stats.drift.squared_residual(linear.weight),
            }
        return solved

    layers.solve = watched  # type: ignore[assignment]
    prune = layers.LayerPass.prune

    def first_only(self: Any, index: int, *others: Any) -> Any:
        if index:
            raise _Captured
        return prune(self, index, *others)

    layers.LayerPass.prune = first_only  # type: ignore[assignment, method-assign]
    # Where linears are trained afterwards, ADMM may be damped more than rounding is.
    recipe = Recipe(calibration=calibration, samples=samples, seq_len=seq_len, reconstruct="admm")
    with TemporaryDirectory() as folder:
        try:
            compress(model, Path(folder) / "out", recipe, Settings(), Monitor(shown=False))
        except _Captured:
            pass
        finally:
            layers.solve, layers.LayerPass.prune = solve, prune  # type: ignore[method-assign]
    return found


@click.command(help=__doc__)
@click.argument("model")
@click.option("--data", "calibration", required=True, help="As for `ria-vllm compress`.")
@click.option("--samples", default=32, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option("--bits", default="4", type=click.Choice(["4", "8"]), show_default=True)
@click.option("--group-size", default="64", type=click.Choice(["32", "64", "128", "row"]), show_default=True)
def main(model: str, calibration: str, samples: int, seq_len: int, bits: str, group_size: str) -> None:
    weight_format = INTEGERS[int(bits), None if group_size == "row" else int(group_size)]
    problems = capture(model, calibration, samples, seq_len)
    found = {name: ways(problem, weight_format) for name, problem in problems.items()}
    click.echo(f"| {weight_format.name} | " + " | ".join(found) + " | mean |\n" + "| --- " * (len(found) + 2) + "|")
    for way in next(iter(found.values())):
        values = [results[way] for results in found.values()]
        cells = [f"{value:.2f}%" for value in (*values, sum(values) / len(values))]
        click.echo(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

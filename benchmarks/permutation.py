"""How long channel permutation takes: `python -m benchmarks.permutation`.

Scores are drawn at random, with rows and channels of different scale. Prints seconds on this machine's CPU; one run
measures both sides of every comparison.
"""

import time
from collections.abc import Callable
from itertools import product

import click
import torch

from ria_vllm.offline.model.run.dtypes import fast_bf16
from ria_vllm.offline.pruning.assignment import coded_gain_matrix, gain_matrix, levels, retained_score
from ria_vllm.offline.pruning.permute import search, search_heads

# Linears that share an input: name, rows stacked, channels; None where heads restrict the channels.
LLAMA_7B = {"qkv": (12288, 4096), "o": (4096, None), "gate+up": (22016, 4096), "down": (4096, 11008)}
SMOLLM2 = {"qkv": (960, 576), "o": (576, None), "gate+up": (3072, 576), "down": (576, 1536)}
DTYPE = torch.bfloat16 if fast_bf16(torch.device("cpu")) else torch.float32


def draw_scores(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = (torch.randn(channels, generator=draw) / 2).exp()
    return torch.randn(rows, channels, generator=draw).abs() * spread * torch.rand(rows, 1, generator=draw)


def direct_gain_matrix(columns: torch.Tensor, index: torch.Tensor, position: int) -> torch.Tensor:
    """As published: form each candidate group, sort its scores in each row, and sum the two largest."""
    groups, others = len(index), [j for j in range(index.shape[1]) if j != position]
    score = columns.new_empty(groups, groups)
    for g in range(groups):
        fixed = columns[index[g, others]]
        candidate = torch.cat([fixed.expand(groups, -1, -1), columns[index[:, position], None]], dim=1)
        score[g] = candidate.sort(dim=1, descending=True).values[:, :2].sum(dim=(1, 2))
    return score


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def compare_gain_matrices(channels: int, rows: int) -> None:
    columns = draw_scores(rows, channels).T.contiguous()
    index = torch.arange(channels).view(-1, 4)
    ladder = levels(columns, 4)
    direct = seconds(lambda: direct_gain_matrix(columns, index, 0))
    print(f"gain matrix of one position, {channels} channels x {rows} rows")
    print(f"  every candidate group gathered and sorted   {direct:8.3f} s")
    for label, work in (
        ("one L1 distance matrix (exact)", lambda: gain_matrix(columns, index, 0)),
        ("matrix product of codes, 4 steps", lambda: coded_gain_matrix(columns, index, 0, ladder, DTYPE)),
    ):
        taken = seconds(work, repeats=5)
        print(f"  {label:42s}  {taken:8.3f} s   {direct / taken:6.0f} x")


def time_model(name: str, shapes: dict, heads: int, kv_heads: int, head_dim: int, layers: int) -> None:
    print(f"{name}, {layers} layer{'s' * (layers > 1)}")
    total = dict.fromkeys(shapes, 0.0)
    gained = {}
    for layer, (part, (rows, channels)) in product(range(layers), shapes.items()):
        S = draw_scores(rows, channels or heads * head_dim, seed=layer)
        start = time.perf_counter()
        p = search(S, dtype=DTYPE) if channels else search_heads(S, heads, kv_heads, head_dim, {"dtype": DTYPE})
        total[part] += time.perf_counter() - start
        permutations = torch.arange(S.shape[1]), p
        gained[part] = [float(retained_score(S.T.contiguous(), one.view(-1, 4)) / S.sum()) for one in permutations]
    for part, taken in total.items():
        before, after = gained[part]
        print(f"  {part:8s} {taken:7.2f} s   retained score {before:.4f} -> {after:.4f}")
    print(f"  {'total':8s} {sum(total.values()):7.2f} s")


@click.command(help=__doc__)
def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare_gain_matrices(channels=1024, rows=2048)
    time_model("SmolLM2-135M shapes", SMOLLM2, heads=9, kv_heads=3, head_dim=64, layers=30)
    time_model("Llama-2-7B shapes", LLAMA_7B, heads=32, kv_heads=32, head_dim=128, layers=1)


if __name__ == "__main__":
    main()

"""`python -m benchmarks.cpu_experts`: its tables, and that it measures each dense operator that vLLM has here."""

from benchmarks import cpu_dense, cpu_experts


def test_tables_divide_dense_times_by_ours():
    rows = [
        {"name": "32 experts", "threads": 1, "tokens": tokens, "seconds": seconds}
        for tokens, seconds in (
            (1, {"ours": 2.0, "cpu_fused_moe": 3.0, "fused_experts_cpu": 5.0}),
            (8, {"ours": 4.0, "cpu_fused_moe": 6.2, "fused_experts_cpu": 4.0}),
        )
    ]
    tables = cpu_experts.tables(rows).splitlines()
    assert tables[0] == "Ours against cpu_fused_moe:" and tables[2] == "| layer | threads | T=1 | T=8 |"
    assert tables[4] == "| 32 experts (32 of 2048 x 768, top 4) | 1 | 1.50 | 1.55 |"
    assert tables[6] == "Ours against fused_experts_cpu:"
    assert tables[10] == "| 32 experts (32 of 2048 x 768, top 4) | 1 | 2.50 | 1.00 |"


def test_every_side_is_measured(monkeypatch):
    monkeypatch.setattr(cpu_experts, "SHAPES", {"small": (4, 64, 64, 2)})
    (row,) = cpu_experts.measure(["small"], [3], 0.0)
    missing = cpu_dense.missing(*cpu_experts.NOT_EVERYWHERE)
    assert list(row["seconds"]) == ["ours", "cpu_fused_moe", *([] if missing else ["fused_experts_cpu"])]
    assert all(seconds > 0 for seconds in row["seconds"].values())

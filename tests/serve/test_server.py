"""A real `vllm serve` on a compressed checkpoint, queried with the `openai` client."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import tiny
import torch
from manifests import serve_arguments

from ria_vllm.serve.benchmark.server import free_port

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(folder: Path, log: Path, *arguments: str):
    """Yields the base URL of a running server, started with the arguments of the manifests. If it does not start, its
    log is in the error."""
    port = free_port()
    vllm = Path(sys.executable).with_name("vllm")  # the environment need not be on the path
    command = [vllm, "serve", *serve_arguments(folder, 128), "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            },
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Compiled, as `vllm serve` is without any flag."""
    folder = tmp_path_factory.mktemp("server")
    model = tiny.write(tiny.FAMILIES["llama-gqa"], folder / "out")
    tiny.add_tokenizer(folder / "out")
    names = ["--dtype", "float32", "--served-model-name", "small"]
    with serving(folder / "out", folder / "log", *names) as url:
        yield url, model, folder / "log"


@pytest.mark.parametrize("method", ["reload_weights", "start_weight_update", "start_draft_weight_update"])
def test_other_weights_are_refused(server, method):
    """The server goes on with its own."""
    url, model, log = server
    content = json.dumps({"method": method}).encode()
    request = urllib.request.Request(f"{url}/collective_rpc", content, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=100)
    assert f"{method}: a running server of a pruned model takes no other weights" in log.read_text()
    check_completion(url, model)


def test_completion_has_the_logprobs_of_the_pruned_model(server):
    check_completion(*server[:2])


def check_completion(url: str, model: torch.nn.Module) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    prompt = torch.randint(3, 259, (21,), generator=torch.Generator().manual_seed(3)).tolist()
    answer = client.completions.create(
        model="small",
        prompt=prompt,
        max_tokens=8,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice = answer.choices[0]
    tokens = choice.model_extra["token_ids"]
    assert len(tokens) == 8
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + tokens])).logits.log_softmax(-1)[0]
    want = logprobs[len(prompt) - 1 : -1]
    assert (want.argmax(-1) == torch.tensor(tokens)).all()
    got = torch.tensor(choice.logprobs.token_logprobs)
    assert (got - want.max(-1).values).abs().max() < 1e-4  # as in test_vllm.py, for float32


def test_chat_streams(server):
    url, _, _ = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    parts = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hello"}], max_tokens=5, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert list(parts)[-1].usage.completion_tokens == 5

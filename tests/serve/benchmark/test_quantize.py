"""MODEL:Q4_0 with stand-ins for llama.cpp's programs."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hub_cache import NAME, Cache

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.engines import Vllm, engine_of
from ria_vllm.serve.benchmark.llama_cpp import LlamaCpp, vllm_threads
from ria_vllm.serve.benchmark.quantize import CONVERT, QUANTIZE, quantized
from ria_vllm.serve.benchmark.sides import sides_of

CONVERTER = """
import json, sys
source, outtype, kind, outfile, path = sys.argv[1:]
assert (outtype, outfile) == ("--outtype", "--outfile")
open(path, "w").write(json.dumps({"source": source, "exact": kind}))
"""
QUANTIZER = f"""#!{sys.executable}
import json, sys
whole, out, kind, threads = sys.argv[1:]
if kind == "Q9":
    sys.exit("invalid ftype")
content = json.load(open(whole)) | {{"type": kind, "threads": int(threads)}}
open(out, "w").write(json.dumps(content))
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(autouse=True)
def counted_threads():
    """While lscpu, which vLLM asks, is still on the path."""
    vllm_threads()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """llama.cpp as it is built, with a link to its server on the path."""
    root = tmp_path / "llama.cpp"
    write(root / CONVERT, CONVERTER)
    write(root / "build" / "bin" / QUANTIZE, QUANTIZER)
    write(root / "build" / "bin" / "llama-server", "")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-server").symlink_to(root / "build" / "bin" / "llama-server")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return root


def made(text: str, folder: Path):
    (side,) = sides_of([text])
    return quantized(side, folder, Monitor(shown=False))


def test_a_folder_becomes_a_gguf_side(checkout, tiny_llama, tmp_path):
    side = made(f"rival={tiny_llama}:Q4_0", tmp_path / "gguf")
    path = tmp_path / "gguf" / "rival.gguf"
    assert (side.name, side.model, side.bytes) == ("rival", str(path), path.stat().st_size)
    threads = len(os.sched_getaffinity(0))
    assert json.loads(path.read_text()) == {
        "source": str(tiny_llama), "exact": "f32", "type": "Q4_0", "threads": threads,
    }  # fmt: skip
    assert sorted(one.name for one in (tmp_path / "gguf").iterdir()) == [
        f"rival-{CONVERT}.log", f"rival-{QUANTIZE}.log", "rival.gguf",
    ]  # fmt: skip
    assert made(f"{tiny_llama}:q8_0", tmp_path / "gguf").name == "llama:q8_0"


def test_a_hub_id_becomes_a_gguf_side(checkout, tiny_llama, tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cache", tiny_llama, monkeypatch)
    side = made(f"rival={NAME}:Q4_0", tmp_path / "gguf")
    assert json.loads(Path(side.model).read_text())["source"] == str(cache.commit())


def test_programs_that_are_installed(checkout, tiny_llama, tmp_path):
    """The converter lies beside no server there."""
    for path in (checkout / CONVERT, checkout / "build" / "bin" / QUANTIZE):
        shutil.move(path, tmp_path / "bin")
    assert Path(made(f"rival={tiny_llama}:Q4_0", tmp_path / "gguf").model).is_file()


def test_what_is_no_such_side_stays(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    folder = shutil.copytree(tiny_llama, tmp_path / "m:Q4_0")
    shutil.copytree(tiny_llama, tmp_path / "m")
    for text in (str(folder), "org/model", "http://h:80", "a.gguf"):
        (side,) = sides_of([text])
        assert quantized(side, tmp_path / "gguf", Monitor(shown=False)) is side
    assert isinstance(engine_of(str(folder)), Vllm) and isinstance(engine_of(f"{tiny_llama}:Q4_0"), LlamaCpp)


@pytest.mark.parametrize("missing", [CONVERT, QUANTIZE])
def test_a_missing_program(missing, checkout, tiny_llama, tmp_path):
    for path in checkout.rglob(missing):
        path.unlink()
    with pytest.raises(RiaError, match=f"no {missing}. It is part of llama.cpp: clone https"):
        made(f"rival={tiny_llama}:Q4_0", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_program_that_fails(checkout, tiny_llama, tmp_path):
    with pytest.raises(RiaError, match="(?s):Q9: llama-quantize ended with status 1.*invalid ftype"):
        made(f"rival={tiny_llama}:Q9", tmp_path / "gguf")


def test_a_source_that_is_none(checkout, tiny_llama, tmp_path, monkeypatch):
    """The converter runs the code that a folder names, and unpickles weights."""
    Cache(tmp_path / "cache", tiny_llama, monkeypatch)
    with pytest.raises(RiaError, match="org/other: no such folder here, and the hub did not provide it .*`hf download"):
        made("org/other:Q4_0", tmp_path / "gguf")
    for name in ("config.json", "tokenizer_config.json"):
        folder = shutil.copytree(tiny_llama, tmp_path / name)
        config = folder / name
        content = json.loads(config.read_text()) if config.is_file() else {}
        config.write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": "org/repo--code.Tokenizer"}}))
        with pytest.raises(RiaError, match=f"{name}: names Python code"):
            made(f"rival={folder}:Q4_0", tmp_path / "gguf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RiaError, match="no weights here"):
        made(f"rival={folder}:Q4_0", tmp_path / "gguf")

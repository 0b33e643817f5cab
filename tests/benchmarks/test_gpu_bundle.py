"""What is packed for a GPU."""

import hashlib
import json
import shutil
import subprocess

import pytest
from pretend_hopper import TILES

from benchmarks import gpu_bundle
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES

HOPPER = ARCHITECTURES["90a"]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compiling is replaced; returns the tiles that were compiled."""
    calls = []

    def compile_library(target, folder, tiles):
        calls.append([tile.name for tile in tiles])
        with (folder / target.library).open("wb") as file:
            file.truncate(1000)
        return folder / target.library

    monkeypatch.setattr(build, "compile_library", compile_library)
    monkeypatch.setattr(gpu_bundle, "cuda_version", lambda: "13.0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_: subprocess.CompletedProcess([], 1))
    return calls


def test_pack(compiled, tmp_path, capsys, monkeypatch):
    calls = compiled
    gpu_bundle.pack(tmp_path, HOPPER)
    gpu_bundle.pack(tmp_path, HOPPER)
    assert calls == [TILES] and gpu_bundle.reason_against(tmp_path, HOPPER) is None
    said = capsys.readouterr().out
    assert HOPPER.library in said and "compute-sanitizer was not downloaded" in said
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    with (tmp_path / "csrc" / "library.cu").open("a") as file:
        file.write("// changed")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    assert "was not packed from the sources" in gpu_bundle.reason_against(tmp_path, HOPPER)
    gpu_bundle.pack(tmp_path, HOPPER)
    assert len(calls) == 2
    packed = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert packed == {HOPPER.library: hashlib.sha256(bytes(1000)).hexdigest()}
    needed = "\n".join(gpu_bundle.needs(tmp_path, HOPPER))
    assert "one of sm_90a" in needed and "CUDA 13.0 or newer" in needed and HOPPER.library in needed
    with (tmp_path / HOPPER.library).open("r+b") as file:
        file.write(b"1")

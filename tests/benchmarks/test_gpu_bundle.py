"""What is packed for a GPU, and what is written into MEASURED after it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from pretend_hopper import TILES

from benchmarks import gpu_bundle, gpu_measured
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES

HOPPER = ARCHITECTURES["90a"]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compiling is replaced; returns the tiles that were compiled, and the size that the library gets."""
    calls, size = [], [1000]

    def compile_library(target, folder, tiles):
        calls.append([tile.name for tile in tiles])
        with (folder / target.library).open("wb") as file:
            file.truncate(size[0])
        return folder / target.library

    monkeypatch.setattr(build, "compile_library", compile_library)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_: subprocess.CompletedProcess([], 1))
    return calls, size


def test_pack(compiled, tmp_path, capsys, monkeypatch):
    calls, _ = compiled
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


def test_a_bundle_that_is_too_large(compiled, tmp_path):
    compiled[1][0] = 61 * 2**20
    with pytest.raises(RiaError, match="larger than 60 MiB"):
        gpu_bundle.pack(tmp_path, HOPPER)


def measured(tile, us, tokens, **changed):
    row = {"family": 90, "multiprocessors": 132, "value_bits": 16, "out_features": 64, "in_features": 128, "split": 1}
    return {**row, "tile": tile, "us": us, "tokens": tokens, **changed}


def test_fill_keeps_other_rows_and_names_candidates(tmp_path):
    source = tmp_path / "tiles.py"
    source.write_text(
        'A = 1\nMEASURED: dict = {(90, 78, 16, 8, 64): ((1, "old", 2),), (90, 132, 16, 64, 128): ()}\nB = 2\n'
    )
    rows = [measured("64x16_pingpong", 1.0, tokens) for tokens in (1, 16, 32)]
    rows += [measured("slow", 3.0, 1), measured("128x64_streamk", 0.5, 64, split=3)]
    for _ in range(2):
        assert gpu_measured.fill(source, gpu_measured.table_of(rows)) == ["64x16_pingpong"]
        names = {}
        exec(source.read_text(), names)
        assert names["A"] == 1 and names["B"] == 2
        assert names["MEASURED"] == {
            (90, 78, 16, 8, 64): ((1, "old", 2),),
            (90, 132, 16, 64, 128): ((32, "64x16_pingpong", 1), (64, "128x64_streamk", 3)),
        }
    with pytest.raises(RiaError, match="does not assign MEASURED"):
        gpu_measured.fill(Path(__file__), {})

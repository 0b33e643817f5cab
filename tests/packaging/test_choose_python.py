"""Which Python `make` chooses, before there is an environment."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Runs the program in argv[1] as another Python would, as far as that program can tell.
PRETEND = """
import importlib.util, os, sys
sys.version_info = ({version}, 0, "final", 0)
exists, find = os.path.exists, importlib.util.find_spec
os.path.exists = lambda path: {header} if str(path).endswith("Python.h") else exists(path)
importlib.util.find_spec = lambda name: None if name in {without!r} else find(name)
exec(sys.argv[1])
"""


class Machine:
    """A PATH of one folder, with nothing in it but fake Pythons."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def add(self, name: str, version: str, without: tuple[str, ...] = (), header: bool = True) -> str:
        program = self.folder / f"{name}.pretend"
        program.write_text(PRETEND.format(version=version.replace(".", ", "), without=without, header=header))
        return self.write(name, f'exec "{sys.executable}" "{program}" "$2"')

    def write(self, name: str, body: str) -> str:
        file = self.folder / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
        return str(file)

    def choose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        make = shutil.which("make")
        assert make is not None
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
        command = [make, "-s", "-C", str(ROOT), "print-python", *arguments]
        return subprocess.run(command, env=environment | {"PATH": str(self.folder)}, capture_output=True, text=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "bin")


def test_a_python3_that_does_not_fit_is_passed_over(machine):
    machine.add("python3", "3.15")
    machine.add("python3.14", "3.14", without=("ensurepip",))
    machine.add("python3.13", "3.13", header=False)
    path = machine.add("python3.12", "3.12")
    assert machine.choose().stdout.strip() == path


def test_one_that_is_named_is_the_only_candidate(machine):
    machine.add("python3", "3.13")
    path = machine.add("python3.12", "3.12")
    assert machine.choose("PYTHON=python3.12").stdout.strip() == path
    assert machine.choose(f"PYTHON={path}").stdout.strip() == path
    machine.add("python3.10", "3.10")
    found = machine.choose("PYTHON=python3.10")
    assert found.returncode and "Python 3.10 is not 3.11 to 3.14" in found.stderr


def test_the_oldest_one_is_the_oldest_that_pip_accepts_and_that_the_types_are_checked_for(machine):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = declared["project"]["requires-python"].removeprefix(">=")
    assert declared["tool"]["mypy"]["python_version"] == oldest
    path = machine.add("python3", oldest)
    assert machine.choose().stdout.strip() == path
    major, _, minor = oldest.partition(".")
    machine.add("python3", f"{major}.{int(minor) - 1}")
    assert machine.choose().returncode

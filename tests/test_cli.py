"""The command line: commands load lazily, errors are one line, and exit statuses are reliable."""

import subprocess
import sys

import pytest

from ria_vllm.cli import COMMANDS, group, main


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


def test_main_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ria-vllm", "inspect", "/nowhere"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "ria-vllm: /nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_exists(name):
    command = group.get_command(None, name)
    assert command is not None and command.help

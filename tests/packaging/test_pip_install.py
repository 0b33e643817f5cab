"""How torch's CPU build is found if pip knows no index that has it: with the real pip, on indexes in folders."""

import os
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch):
    """packaging/pip_install.py as a module, for a pip that nothing configures."""
    for name in os.environ:
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.syspath_prepend(ROOT / "packaging")
    spec = spec_from_file_location("pip_install", ROOT / "packaging" / "pip_install.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(index: Path, name: str, version: str, requires: str = "") -> None:
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        info, needed = f"{name}-{version}.dist-info", f"Requires-Dist: {requires}\n" * bool(requires)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text("".join(f'<a href="{f.name}">{f.name}</a>' for f in folder.glob("*.whl")))


@pytest.mark.parametrize("constraint", [[], ["-c", "constraint"]])
def test_the_build_comes_from_pytorchs_index_where_no_other_has_it(program, tmp_path, monkeypatch, capfd, constraint):
    monkeypatch.chdir(tmp_path)
    index, pytorchs, arguments = tmp_path / "index", tmp_path / "pytorchs", ["--target", "there", *constraint, "needy"]
    monkeypatch.setenv("PIP_INDEX_URL", index.as_uri())
    monkeypatch.setattr(program, "CPU_BUILDS", pytorchs.as_uri())
    write_wheel(index, "torchlike", "2.0")
    write_wheel(index, "needy", "1", 'torchlike==2.0+cpu; python_version > "3"')
    (tmp_path / "constraint").write_text("torchlike==2.0\n")
    assert program.main(arguments) and not Path("there").exists()
    said = capfd.readouterr()
    assert "No index that pip knows has torchlike==2.0+cpu." in said.out
    assert "could not get torchlike==2.0+cpu" in said.err and "PIP_ARGS" in said.err

    write_wheel(pytorchs, "torchlike", "2.0+cpu")
    assert program.main(arguments) == 0, capfd.readouterr()
    assert Path("there", "torchlike-2.0+cpu.dist-info").exists() and Path("there", "needy-1.dist-info").exists()

"""packaging/check_vllm.py, on the vLLM that is installed and on small packages made for the test."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from ria_vllm.errors import RiaError

SCRIPT = Path(__file__).parents[2] / "packaging" / "check_vllm.py"
spec = spec_from_file_location("check_vllm", SCRIPT)
check = module_from_spec(spec)
spec.loader.exec_module(check)

USER = """
import vllm.envs as envs
from vllm import ops
from vllm.layers import Linear, Method as M
def f():
    from vllm.config import get
    return ops.mm(envs.FLAG), Linear.apply
"""
PACKAGE = {
    "vllm/__init__.py": "TABLE = {'LLM': '.llm'}",
    "vllm/envs.py": "if True:\n    FLAG = 1",
    "vllm/ops.py": "def mm(): ...",
    "vllm/layers/__init__.py": "from .base import Method\nclass Linear: ...",
    "vllm/config.py": "try:\n    from x import get\nexcept ImportError:\n    get = None",
}


def test_imported_names():
    assert set(check.imported_names(USER)) == {
        ("vllm", "envs"), ("vllm", "ops"), ("vllm.layers", "Linear"), ("vllm.layers", "Method"), ("vllm.config", "get"),
        ("vllm.ops", "mm"), ("vllm.envs", "FLAG"), ("vllm.layers.Linear", "apply"),
    }  # fmt: skip
    assert not set(check.imported_names("import torch\nfrom ria_vllm import vllm\nvllm.x"))


def test_a_package_that_has_everything():
    assert check.missing(check.imported_names(USER), PACKAGE.get) == []
    assert check.missing([("vllm", "LLM")], PACKAGE.get) == []


@pytest.mark.parametrize(
    "file, text, absent",
    [
        ("vllm/ops.py", "def multiply(): ...", "vllm.ops.mm"),
        ("vllm/layers/__init__.py", "class Linear: ...", "vllm.layers.Method"),
    ],
)
def test_a_name_that_is_gone(file, text, absent):
    assert check.missing(check.imported_names(USER), (PACKAGE | {file: text}).get) == [absent]


def test_the_vllm_that_is_installed(capsys):
    installed = find_spec("vllm")
    if installed is None:
        pytest.skip("vLLM is not installed")
    assert check.main(Path(installed.origin).parents[1]) == 0
    assert int(capsys.readouterr().out.split("has all ")[1].split()[0]) > 10


def test_what_is_no_interface_is_listed_with_a_reason():
    """In both directions: nothing that is used is missing, and nothing is listed that is not used."""
    from ria_vllm.serve.vllm_names import INTERFACE, NAMES

    sources = (SCRIPT.parents[1] / "serve").rglob("*.py")
    used = {f"{module}.{name}" for file in sources for module, name in check.imported_names(file.read_text())}

    def below(name, names):
        return [one for one in names if name == one or name.startswith(f"{one}.")]

    private = {name for name in used if not below(name, INTERFACE) and name not in INTERFACE}
    private -= {".vllm", "vllm.__version__"}
    assert {name for name in private if not below(name, NAMES)} == set()
    assert {one for one in NAMES if not any(below(name, [one]) for name in private)} == set()


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.1+cpu", True), ("0.33.0", False), ("0.29.1", False), ("0.1.dev7", True), ("dev", True)],
)
def test_versions(caplog, version, tested):
    from ria_vllm.serve.vllm_names import check_version

    caplog.set_level("WARNING", logger="vllm.ria")
    check_version(version)
    assert (f"vLLM {version} was not tested" in caplog.text) == (not tested)


def test_a_vllm_without_a_name_says_what_to_install(monkeypatch):
    from vllm.model_executor.layers import quantization

    from ria_vllm.serve import plugin

    monkeypatch.delattr(quantization, "register_quantization_config")
    with pytest.raises(RiaError, match="register_quantization_config.*Install vLLM 0.30"):
        plugin.register()

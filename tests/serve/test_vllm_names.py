"""packaging/check_vllm.py, on the vLLM that is installed and on small packages made for the test."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

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


def test_what_every_module_has():
    assert check.missing([("vllm.ops", "__file__"), ("vllm.none", "__file__")], PACKAGE.get) == ["vllm.none.__file__"]


@pytest.mark.parametrize(
    "file, text, absent",
    [
        ("vllm/ops.py", "def multiply(): ...", "vllm.ops.mm"),
        ("vllm/envs.py", "# FLAG", "vllm.envs.FLAG"),
        ("vllm/config.py", "got = 1", "vllm.config.get"),
        ("vllm/layers/__init__.py", "class Linear: ...", "vllm.layers.Method"),
    ],
)
def test_a_name_that_is_gone(file, text, absent):
    assert check.missing(check.imported_names(USER), (PACKAGE | {file: text}).get) == [absent]


def test_names_that_come_by_a_star():
    package = {
        "vllm/__init__.py": "",
        "vllm/distributed/__init__.py": "from .operations import *",
        "vllm/distributed/operations.py": "def gather(): ...",
        "vllm/plain.py": "from .distributed.operations import *",
    }
    wanted = [(module, name) for module in ("vllm.distributed", "vllm.plain") for name in ("gather", "scatter")]
    assert check.missing(wanted, package.get) == ["vllm.distributed.scatter", "vllm.plain.scatter"]


def test_a_module_that_is_gone():
    left = {file: text for file, text in PACKAGE.items() if "layers" not in file}
    absent = ["vllm.layers.Linear", "vllm.layers.Linear.apply", "vllm.layers.Method"]
    assert check.missing(check.imported_names(USER), left.get) == absent


def test_the_vllm_that_is_installed(capsys):
    installed = find_spec("vllm")
    if installed is None:
        pytest.skip("vLLM is not installed")
    assert check.main(Path(installed.origin).parents[1]) == 0
    assert int(capsys.readouterr().out.split("has all ")[1].split()[0]) > 10

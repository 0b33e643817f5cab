"""packaging/check_vllm.py on the vLLM that is installed, and the names of vLLM that are listed."""

import ast
import re
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from ria_vllm.errors import RiaError

SCRIPT = Path(__file__).parents[2] / "packaging" / "check_vllm.py"
spec = spec_from_file_location("check_vllm", SCRIPT)
check = module_from_spec(spec)
spec.loader.exec_module(check)


def test_the_vllm_that_is_installed(capsys):
    installed = find_spec("vllm")
    if installed is None:
        pytest.skip("vLLM is not installed")
    assert check.main(Path(installed.origin).parents[1]) == 0
    assert int(capsys.readouterr().out.split("has all ")[1].split()[0]) > 10


def test_what_is_no_interface_is_listed_with_a_reason():
    """In both directions: nothing that is used is missing, and nothing is listed that is not used."""
    from ria_vllm.serve.vllm_names import INTERFACE, NAMES, OF_BENCH

    *product, _ = check.OURS
    sources = {file: file.read_text() for folder in product for file in folder.rglob("*.py")}
    used = {f"{module}.{name}" for source in sources.values() for module, name in check.imported_names(source)}
    listed = {name.replace(":", ".") for name in NAMES | OF_BENCH}

    def below(name, names):
        return any(name == one or name.startswith(f"{one}.") for one in names)

    private = {name for name in used - {".vllm", "vllm.__version__"} if not below(name, INTERFACE)}
    modules = {name for name in private if any(one.startswith(f"{name}.") for one in listed)}
    assert {name for name in private - modules if not below(name, listed)} == set()
    of_objects = private_attributes(ast.parse(source) for file, source in sources.items() if "serve" in file.parts)
    assert of_objects - {one.rpartition(".")[2] for one in listed} == set()
    assert {one for one in listed if one not in used and one.rpartition(".")[2] not in of_objects} == set()


def private_attributes(trees):
    """Those that begin with an underscore and are not our own, torch's or of a module; and what `_replace` replaces."""
    names, own = set(), set(dir(torch.nn.Module()))
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.Attribute(value=ast.Name("self"), attr=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(value=value, attr=name) if name.startswith("_"):
                names |= set() if re.match(r"self$|torch\b", ast.unparse(value)) else {name}
            case ast.Call(func=ast.Name("getattr" | "hasattr"), args=[_, ast.Constant(str(name)), *_]):
                names |= {name} if name.startswith("_") else set()
            case ast.Call(func=ast.Name("_replace"), args=[_, ast.Constant(str(name)), *_]):
                names.add(name)
    return {name for name in names - own if not name.startswith("__")}


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.1+cpu", True), ("0.33.0", False), ("0.29.1", False), ("0.1.dev7", True), ("dev", True)],
)
def test_versions(caplog, version, tested):
    from ria_vllm.serve.vllm_names import check_version

    caplog.set_level("WARNING", logger="vllm.ria")
    check_version(version)
    assert (f"vLLM {version} was not tested" in caplog.text) == (not tested)


@pytest.mark.parametrize(
    "name", ["layers.quantization.register_quantization_config", "model_loader.utils.record_metadata_for_reloading"]
)
def test_a_vllm_without_a_name_says_what_to_install(name, monkeypatch):
    import vllm

    from ria_vllm.serve import plugin

    monkeypatch.delattr(f"vllm.model_executor.{name}")
    leaf = name.rpartition(".")[2]
    with pytest.raises(RiaError, match=f"vLLM {re.escape(vllm.__version__)}.*{leaf}.*Install vLLM 0.30 to 0.32"):
        plugin.register()


def test_names_of_objects_and_of_modules_that_nobody_imports(monkeypatch):
    from ria_vllm.serve import vllm_names

    for name in vllm_names.NAMES:
        import_module(name.partition(":")[0])
    vllm_names.check_names("1.2")
    for name in ("vllm.no.thing:x", "vllm.thing:x", "vllm.v1.worker.gpu_worker:Worker._no_thing"):
        monkeypatch.setattr(vllm_names, "NAMES", {name: "a test"})
        with pytest.raises(RiaError, match=rf"vLLM 1.2 has no {name} \(a test\)"):
            vllm_names.check_names("1.2")

"""Checks that a vLLM, which need not be installed, has every name that ria-vllm uses.

    python packaging/check_vllm.py vllm-0.33.0-cp38-abi3-manylinux_2_31_x86_64.whl

The argument is a wheel, or a folder that holds the package `vllm`. Its sources are parsed; none of its code runs.
"""

import ast
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

OURS = [Path(__file__).parent.parent / folder for folder in ("ria_vllm", "offline", "serve", "benchmarks")]

# What Python gives every module.
OF_EVERY_MODULE = {"__doc__", "__file__", "__name__"}

# A path such as "vllm/config/__init__.py" -> the file's text; None if there is no such file.
Read = Callable[[str], "str | None"]


def imported_names(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a source imports from vLLM, and of every attribute that it uses of such an
    import.
    """
    tree = ast.parse(source)
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    modules[alias.asname or alias.name] = alias.name
                    parent, _, leaf = alias.name.rpartition(".")
                    yield parent, leaf
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.module, alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            yield modules[ast.unparse(node.value)], node.attr


def missing(names: Iterable[tuple[str, str]], read: Read) -> list[str]:
    """The names that vLLM lacks. Attributes of anything but a module (of a class, say) are not looked up."""
    return sorted(f"{module}.{name}" for module, name in set(names) if not _has(module, name, read))


def _has(module: str, name: str, read: Read) -> bool:
    path, source = _source(module, read)
    if source is None:
        parent, _, leaf = module.rpartition(".")
        # An attribute of a class or function: it is enough that the latter exists.
        return bool(parent) and _source(parent, read)[1] is not None and _has(parent, leaf, read)
    if _source(f"{module}.{name}" if module else name, read)[1] is not None:
        return True
    body = ast.parse(source).body
    if name in OF_EVERY_MODULE | _bound(body):
        return True
    starred = [node for node in body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    for node in starred:
        base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        if _has(".".join([*base, *filter(None, [node.module])]), name, read):
            return True
    return False


def _source(module: str, read: Read) -> tuple[str, str | None]:
    """The path of a module and its text, which is None if there is no such module."""
    if not module:
        return "", ""
    folder = module.replace(".", "/")
    for path in (f"{folder}/__init__.py", f"{folder}.py"):
        if (text := read(path)) is not None:
            return path, text
    return "", None


def _bound(body: list[ast.stmt]) -> set[str]:
    """Names bound at a module's top level, branches included, and the keys of a table of lazy imports."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            if isinstance(node.value, ast.Dict):
                keys = (key.value for key in node.value.keys if isinstance(key, ast.Constant))
                names |= {key for key in keys if isinstance(key, str)}
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                names |= _bound(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            names |= _bound(handler.body)
    return names


def reader(path: Path) -> Read:
    if path.is_dir():
        return lambda name: (path / name).read_text() if (path / name).is_file() else None
    archive = zipfile.ZipFile(path)
    files = set(archive.namelist())
    return lambda name: archive.read(name).decode() if name in files else None


def main(path: Path) -> int:
    names = {name for folder in OURS for file in folder.rglob("*.py") for name in imported_names(file.read_text())}
    absent = missing(names, reader(path))
    for name in absent:
        print(f"{path.name}: no {name}")
    if not absent:
        print(f"{path.name}: has all {len(names)} names that ria-vllm uses")
    return int(bool(absent))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

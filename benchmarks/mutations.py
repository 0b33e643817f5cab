"""How many small errors the tests catch: `python -m benchmarks.mutations CHECKOUT`.

Breaks the product in random places, one at a time, and runs the quick tests of the files that import the broken module,
or whose imports do. Places and changes depend on --seed and on the product of CHECKOUT alone, so that two checkouts
that differ in tests only are broken alike. CHECKOUT is changed, and restored.
"""

import ast
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

PACKAGES = {"ria_vllm": "ria_vllm", "offline": "ria_vllm.offline", "serve": "ria_vllm.serve"}
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.BitAnd: ("&", "|"),
}  # fmt: skip
DTYPES = {"float32": "bfloat16", "bfloat16": "float32", "float64": "float32", "int8": "uint8", "int32": "int64"}
FILES, SECONDS = 6, 300


def changes(text: str) -> Iterator[tuple[int, int, str]]:
    """What may be broken in a module: (start, end, replacement) in characters."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:
        before = text[starts[line - 1] :].encode()[:column].decode()
        return starts[line - 1] + len(before)

    def span(node: ast.expr) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)

    for node in ast.walk(ast.parse(text)):
        operator: type[ast.AST]
        if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            left, right, operator = node.left, node.comparators[0], type(node.ops[0])
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _is_text(node):
            left, right, operator = node.left, node.right, type(node.op)
        elif isinstance(node, ast.Attribute) and node.attr in DTYPES and _name(node.value) == "torch":
            yield *span(node), f"torch.{DTYPES[node.attr]}"
            continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield *span(node), str(not node.value if isinstance(node.value, bool) else node.value + 1)
            continue
        elif isinstance(node, ast.Call) and len(node.args) > 1 and all(_name(one) for one in node.args[:2]):
            (start, middle), (after, end) = span(node.args[0]), span(node.args[1])
            yield start, end, text[after:end] + text[middle:after] + text[start:middle]
            continue
        else:
            continue
        (_, start), (end, _) = span(left), span(right)
        between = text[start:end]
        old, new = OPERATORS[operator]
        if between.strip("() \n") == old:
            yield start, end, between.replace(old, new)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(one, ast.JoinedStr | ast.Constant) and not _is_number(one) for one in (node.left, node.right))


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of the product."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """What a file imports: modules, and names of modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
    return found


def nearest(module: str, uses: dict[str, set[str]], tests: dict[Path, set[str]]) -> list[Path]:
    """The test files that are nearest to a module."""
    ring = seen = {module}
    while ring:
        found = sorted((path for path, names in tests.items() if names & ring), key=lambda path: len(tests[path]))
        if found:
            return found[:FILES]
        ring = {name for name, names in uses.items() if names & ring} - seen
        seen = seen | ring
    return []


@click.command(help=__doc__)
@click.argument("checkout", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--places", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="JSON lines; what is in it is not run again.")
def main(checkout: Path, places: int, seed: int, results: Path | None) -> None:
    known = {}
    if results is not None and results.exists():
        known = {row["place"]: row for row in map(json.loads, results.read_text().splitlines())}
    files = modules(checkout)
    uses = {name: imported(path) for name, path in files.items()}
    tests = {path: imported(path) for path in sorted((checkout / "tests").rglob("test_*.py"))}
    possible = [(name, *one) for name, path in files.items() for one in changes(path.read_text())]
    for name, start, end, new in random.Random(seed).sample(possible, places):
        path, text = files[name], files[name].read_text()
        place = f"{path.relative_to(checkout)}:{text.count(chr(10), 0, start) + 1}: {text[start:end]} -> {new}"
        if place not in known:
            path.write_text(text[:start] + new + text[end:])
            try:
                known[place] = {"place": place} | run(checkout, nearest(name, uses, tests))
            finally:
                path.write_text(text)
            if results is not None:
                with results.open("a") as out:
                    out.write(json.dumps(known[place]) + "\n")
        click.echo(f"{'caught' if known[place]['caught'] else 'MISSED'} {place} ({known[place]['by']})")
    click.echo(f"{sum(row['caught'] for row in known.values())} of {len(known)} caught")


def run(checkout: Path, tests: list[Path]) -> dict[str, object]:
    """Whether a test fails, and which."""
    if not tests:
        return {"caught": False, "by": "no test"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    names = [str(path.relative_to(checkout)) for path in tests]
    try:
        done = subprocess.run(
            [*command, *names], cwd=checkout, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"caught": True, "by": "time"}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"caught": done.returncode not in (0, 5), "by": failed[0][:100] if failed else f"rc {done.returncode}"}


if __name__ == "__main__":
    main()

"""What `benchmarks.mutations` breaks, and with which tests."""

import ast
from pathlib import Path

import pytest

from benchmarks.mutations import changes, imported, nearest

CODE = '''
def half(é: str, b, n=2):
    """Not 1 < 2."""
    if len(é) <= 3 and b is True:
        return torch.zeros(n, dtype=torch.int8) + n // 2
    return "one" + é if swap(b, n) != 0 else f(b, key=n)
'''


def test_each_change_breaks_one_thing():
    broken = {CODE[start:end].strip() + " -> " + new.strip() for start, end, new in changes(CODE)}
    wanted = {"2 -> 3", "3 -> 4", "0 -> 1", "True -> False", "<= -> <", "+ -> -", "// -> *", "!= -> ==", "b, n -> n, b"}
    assert broken == wanted | {"torch.int8 -> torch.uint8"}
    for start, end, new in changes(CODE):
        assert ast.dump(ast.parse(CODE[:start] + new + CODE[end:])) != ast.dump(ast.parse(CODE))


@pytest.mark.parametrize(("module", "found"), [("a", ["near"]), ("b", ["far"]), ("c", ["far"]), ("d", [])])
def test_the_nearest_tests_are_run(module, found, tmp_path):
    (tmp_path / "test_near.py").write_text("from p import a")
    (tmp_path / "test_far.py").write_text("import p.b, q")
    uses = {"p.a": set(), "p.b": {"p.c"}, "p.c": set(), "p.d": set()}
    tests = {Path(path.stem.removeprefix("test_")): imported(path) for path in sorted(tmp_path.iterdir())}
    assert [str(path) for path in nearest(f"p.{module}", uses, tests)] == found

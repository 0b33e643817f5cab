"""Tiny models and their pruned forms."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.distill.train import Training
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor


@pytest.fixture(scope="session")
def pruned(tiny, text, tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """(family, options of `Recipe`; for weights, a format such as int4-g32 or int4-row, too) -> (the dense folder, the
    pruned one). Do not write into them."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", **options) -> tuple[Path, Path]:
        key = f"{family} {options}"
        weights, _, size = options.get("weights", "float").partition("-")
        options |= {"weights": weights} | ({"group_size": size if size == "row" else int(size[1:])} if size else {})
        if key not in made:
            out = tmp_path_factory.mktemp("pruned") / "out"
            recipe = Recipe(**{"calibration": str(text), "samples": 4, "seq_len": 32} | options)
            compress(str(tiny(family)), out, recipe, Settings(), Monitor(shown=False))
            made[key] = out
        return tiny(family), made[key]

    return get


@pytest.fixture
def students(monkeypatch) -> list[Student]:
    """Those of the runs so far."""
    found, whole = [], Training.run
    monkeypatch.setattr(Training, "run", lambda self: found.append(self.student) or whole(self))
    return found

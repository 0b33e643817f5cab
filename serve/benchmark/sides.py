"""The sides of a comparison: models, their names, and the sizes of their weights."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark.engines import engine_of


@dataclass(frozen=True)
class Side:
    """One way to serve the model. The first side is the reference: ratios and divergences are against it.

    Attributes:
        bytes: size of its weight files, None if unknown.
        arguments: for its `vllm serve` alone.
    """

    name: str
    model: str
    bytes: int | None
    arguments: tuple[str, ...] = ()


def sides_of(models: Sequence[str], arguments: Sequence[tuple[str, str]] = ()) -> list[Side]:
    """A side for each folder, hub id or NAME=MODEL. Without a name it is called like its folder.

    Args:
        arguments: (name of a side, more arguments for its `vllm serve`).

    Raises:
        RiaError: two sides share a name, or arguments are for an unknown side.
    """
    own: dict[str, tuple[str, ...]] = {}
    for name, text in arguments:
        own[name] = own.get(name, ()) + tuple(shlex.split(text))
    sides: dict[str, Side] = {}
    for text in models:
        name, named, model = text.partition("=")
        if not named or "/" in name or Path(text).exists():  # a path may contain "="
            name, model = Path(text).resolve().name, text
        if not re.fullmatch(r"[^\W_][^$/]*", name):
            raise RiaError(f"{text}: {name!r} is no name for a side. Name it: NAME={model}")
        if name in sides:
            raise RiaError(f"{sides[name].model} and {model} would both be called {name}. Name one: NAME={model}")
        sides[name] = Side(name, model, weight_bytes(model), own.pop(name, ()))
    if own:
        raise RiaError(f"--serve-args-of {next(iter(own))}: no such side. There are {', '.join(sides)}.")
    return list(sides.values())


def weight_bytes(folder: str) -> int | None:
    """Bytes of the weight files of a Hugging Face folder or of a .gguf file; None for a hub id and other formats."""
    try:
        return sum(path.stat().st_size for path in engine_of(folder).weight_files(folder)) or None
    except (RiaError, OSError):
        return None

"""The models of a comparison, and their names."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark.machine import weight_bytes
from ria_vllm.serve.benchmark.results import DENSE, SPARSE, Side

NAME = re.compile(r"[\w.+-]+")


def sides_of(baselines: Sequence[str], outs: Sequence[str], arguments: Sequence[tuple[str, str]] = ()) -> list[Side]:
    """The baselines, the first of which is the reference, then the compressed folders.

    One of each without a name is "dense" and "sparse". Others are called like their folder, or NAME in NAME=MODEL.

    Args:
        arguments: (name of a side, more arguments for its `vllm serve`).

    Raises:
        RiaError: two sides share a name, or arguments are for an unknown side.
    """
    named = [named_model(text) for text in (*baselines, *outs)]
    if len(baselines) == len(outs) == 1 and not any(name for name, _ in named):
        named = [(name, model) for name, (_, model) in zip((DENSE, SPARSE), named, strict=True)]
    own: dict[str, list[str]] = {}
    for name, text in arguments:
        own.setdefault(name, []).extend(shlex.split(text))
    sides = []
    for name, model in named:
        name = name or default_name(model)
        other = next((side.model for side in sides if side.name == name), None)
        if other is not None:
            raise RiaError(f"{other} and {model} would both be called {name}. Name one of them: NAME={model}")
        sides.append(Side(name, model, weight_bytes(model), tuple(own.pop(name, ()))))
    if own:
        names = ", ".join(side.name for side in sides)
        raise RiaError(f"--serve-args-of {next(iter(own))}: no such side. There are {names}.")
    return sides


def named_model(text: str) -> tuple[str | None, str]:
    """(NAME, MODEL) of NAME=MODEL; a path that exists, or a slash before "=", is a model even with "=" in it.

    Raises:
        RiaError: no side can be called NAME.
    """
    name, separator, model = text.partition("=")
    if not separator or Path(text).exists() or "/" in name:
        return None, text
    if not NAME.fullmatch(name):
        raise RiaError(f"{name!r} cannot be the name of {model}: NAME has letters, digits, '_', '.', '+' and '-'.")
    return name, model


def default_name(model: str) -> str:
    """The last part of a path or a hub id, without GGUF's ending."""
    path = Path(model)
    return (path.resolve() if path.exists() else path).name.removesuffix(".gguf")

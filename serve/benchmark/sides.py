"""The sides of a comparison: models, their names, and the sizes of their weights."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ria_vllm.checkpoint.weight_files import MISTRAL_FILES
from ria_vllm.errors import RiaError


@dataclass(frozen=True)
class Side:
    """One way to serve the model. The first side is the reference: ratios and divergences are against it.

    Attributes:
        bytes: size of its weight files, None if they are not on this machine.
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
    own = {name: tuple(shlex.split(text)) for name, text in arguments}
    sides: dict[str, Side] = {}
    for text in models:
        name, named, model = text.partition("=")
        if not named or "/" in name or Path(text).exists():  # a path may contain "="
            name, model = Path(text).name, text
        if name in sides:
            raise RiaError(f"{sides[name].model} and {model} would both be called {name}. Name one: NAME={model}")
        sides[name] = Side(name, model, weight_bytes(model), own.pop(name, ()))
    if own:
        raise RiaError(f"--serve-args-of {next(iter(own))}: no such side. There are {', '.join(sides)}.")
    return list(sides.values())


def weight_bytes(model: str) -> int | None:
    """Bytes of the weight files of a folder, or of a hub id's local copy; None if there are none.

    Weights in Mistral's own format beside others are a second copy, and do not count.
    """
    folder = Path(model)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception:  # the hub's library raises many types for a missing copy
            return None
    files = sorted(folder.glob("*.safetensors"))
    own = [path for path in files if not fnmatchcase(path.name, MISTRAL_FILES)]
    return sum(path.stat().st_size for path in own or files) or None

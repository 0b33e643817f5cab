"""The sides of a comparison: models, their names, and the sizes of their weights."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ria_vllm.checkpoint.reader import is_compressed
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format.schema import RiaSchema
from ria_vllm.serve.benchmark.engines import engine_of, is_url


@dataclass(frozen=True)
class Side:
    """One way to serve the model. The first side is the reference: ratios and divergences are against it.

    Attributes:
        bytes: size of its weight files, None if unknown.
        arguments: for its `vllm serve` alone.
        pruned: the pattern and the scheme of a folder of ours, such as 2:4 W8A8; empty for others.
        threads: with which its server computes; None on a GPU, and if it runs already.
    """

    name: str
    model: str
    bytes: int | None
    arguments: tuple[str, ...] = ()
    pruned: str = ""
    threads: int | None = None


def sides_of(models: Sequence[str], arguments: Sequence[tuple[str, str]] = ()) -> list[Side]:
    """A side for each folder, hub id, URL or NAME=MODEL. Without a name it is called like its folder or host.

    Args:
        arguments: (name of a side, more arguments for its `vllm serve`).

    Raises:
        RiaError: two sides share a name, a URL has a secret, or arguments are for an unknown side or a URL.
    """
    own: dict[str, tuple[str, ...]] = {}
    for name, text in arguments:
        own[name] = own.get(name, ()) + tuple(shlex.split(text))
    sides: dict[str, Side] = {}
    for text in models:
        name, named, model = text.partition("=")
        if not named or ("/" in name and not is_url(model)) or Path(text).exists():  # a path may contain "="
            name, model = "" if is_url(text) else Path(text).resolve().name, text
        if is_url(model):
            model, host = _plain(model)  # before anything quotes it
            name = name or host
        if not re.fullmatch(r"[^\W_][^$/]*", name):
            raise RiaError(f"{model}: {name!r} is no name for a side. Name it: NAME={model}")
        if name in sides:
            raise RiaError(f"{sides[name].model} and {model} would both be called {name}. Name one: NAME={model}")
        if is_url(model) and name in own:
            raise RiaError(f"--serve-args-of {name}: its server runs already, at {model}.")
        threads = engine_of(model).threads()
        sides[name] = Side(name, model, weight_bytes(model), own.pop(name, ()), pruned(model), threads)
    if own:
        raise RiaError(f"--serve-args-of {next(iter(own))}: no such side. There are {', '.join(sides)}.")
    return list(sides.values())


def _plain(url: str) -> tuple[str, str]:
    """A URL without /v1 at its end, and its host; behind # it may name a model.

    Raises:
        RiaError: it is none, or it has a secret, or may have one; it is not quoted.
    """
    address, mark, model = url.partition("#")
    try:
        host = urlsplit(address).netloc
    except ValueError:
        host = ""
    if not host:
        raise RiaError("A side looks like a URL, but has no valid host: give http://HOST:PORT, or https://.")
    if "@" in url or "?" in url:
        raise RiaError(
            "A URL with a user, a password or a query would be in the results of bench. Leave these out: VLLM_API_KEY "
            "is the key of the servers."
        )
    return address.rstrip("/").removesuffix("/v1") + mark + model, host


def pruned(folder: str) -> str:
    """The pattern and the scheme of a folder that ria-vllm wrote; empty for whatever else.

    Raises:
        RiaError: its config.json is damaged.
    """
    path = Path(folder)
    if not is_compressed(path):
        return ""
    schema = RiaSchema.parse(read_json(path / "config.json")["quantization_config"], str(path / "config.json"))
    return f"{schema.pattern} {schema.scheme}"


def weight_bytes(folder: str) -> int | None:
    """Bytes of the weight files of a Hugging Face folder or of a .gguf file; None for a hub id and other formats."""
    try:
        return sum(path.stat().st_size for path in engine_of(folder).weight_files(folder)) or None
    except (RiaError, OSError):
        return None

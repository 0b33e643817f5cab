"""Data sets of the Hugging Face hub."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.hf import first_line

# Hub id, configuration, and whether to stream it because it is too large to download.
DATASETS = {
    "c4": ("allenai/c4", "en", True),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", False),
    "pile": ("monology/pile-uncopyrighted", None, True),
}


@dataclass(frozen=True)
class HubText:
    """An opened data set: a key of DATASETS, its commit (None: unknown), and its rows, which can be read once."""

    name: str
    revision: str | None
    rows: Iterator[Mapping[str, Any]]


def opened(name: str) -> str | HubText:
    """The training part of a data set, from the hub, or from the cache of `datasets` if the hub cannot be reached.

    Args:
        name: a key of DATASETS; any other source of text is returned as it is.

    Raises:
        RiaError: it is neither on the hub nor in the cache.
    """
    if name not in DATASETS:
        return name
    from datasets import load_dataset_builder

    repository, configuration, streaming = DATASETS[name]
    try:
        # What `load_dataset` does, in steps: the builder knows which commit it reads, also in the cache. To ask the
        # hub instead could name another one, because without a connection `datasets` takes the latest in its cache.
        builder = load_dataset_builder(repository, configuration)
        if streaming:
            rows = iter(builder.as_streaming_dataset(split="train"))
        else:
            builder.download_and_prepare()
            rows = iter(builder.as_dataset(split="train"))
        first = next(rows)
    except Exception as error:
        raise _not_read(name, error) from None
    known = re.fullmatch("[0-9a-f]{40}", str(builder.hash))
    return HubText(name, builder.hash if known else None, itertools.chain([first], _rest(name, rows)))


def _rest(name: str, rows: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The same rows. The connection by which they come may break."""
    try:
        yield from rows
    except Exception as error:
        raise _not_read(name, error) from None


def _not_read(name: str, error: Exception) -> RiaError:
    return RiaError(
        f"--data {name}: {DATASETS[name][0]} cannot be downloaded ({first_line(error)}). Give a text file, or self."
    )

"""The small files that go with a model's weights: tokenizer, templates, license. None of them is code."""

import re
from pathlib import Path

from ria_vllm.errors import printable

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# LICENSE, LICENSE-2.0, LICENSE.md, NOTICE, USE_POLICY.md and the like, but no suffix that a program interprets.
_LEGAL = re.compile(
    r"(licen[cs]e|notice|copying|(acceptable_)?use_policy)([-_][\w-]*(\.\d+)*)?(\.(txt|md|rst|html|pdf))?", re.I
)
# The same for the Hub, whose patterns are case-sensitive.
LEGAL_PATTERNS = ["LICEN[CS]E*", "licen[cs]e*", "Licen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "*USE_POLICY*"]


def leads_out(path: Path) -> bool:
    """Whether `path` is a link to a file outside its folder, and outside the hub's cache if the folder comes from it.

    A downloaded folder could point such a link at any file on this machine, and a copy of the folder would publish it.
    """
    place, home = path.resolve(), path.parent.resolve()
    # Snapshots consist of links: CACHE/models--USER--NAME/snapshots/COMMIT to CACHE/models--USER--NAME/blobs.
    blobs = [(folder.parent / "blobs").resolve() for folder in home.parents if folder.name == "snapshots"]
    # Older versions of the hub's command line also link the large files of a local folder into the cache.
    in_cache = any(f.name == "blobs" and f.parent.name.startswith("models--") for f in place.parents)
    return not in_cache and not any(place.is_relative_to(allowed) for allowed in [home, *blobs])


def left_where_it_is(path: Path) -> str:
    """The warning about a file that is not copied because it `leads_out`."""
    name = printable(str(path))
    return f"{name}: a link that leads out of the folder, not copied. If the file belongs there, copy the file itself."


def is_companion(path: Path) -> bool:
    """Whether a file in a model's folder goes with the model, judged by its name."""
    named = path.suffix in SUFFIXES or _LEGAL.fullmatch(path.name) is not None
    return named and not path.name.startswith(".") and path.is_file()

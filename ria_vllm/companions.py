"""The small files that belong to a model besides its weights: tokenizer, templates, license. None of them is code."""

import re
from pathlib import Path

from ria_vllm.errors import printable

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# LICENSE, LICENSE-2.0, LICENSE.md, NOTICE, USE_POLICY.md and their like; nothing with a suffix that a program reads.
_LEGAL = re.compile(
    r"(licen[cs]e|notice|copying|(acceptable_)?use_policy)([-_][\w-]*(\.\d+)*)?(\.(txt|md|rst|html|pdf))?", re.I
)
# As the Hub's patterns, which know no "ignore case".
LEGAL_PATTERNS = ["LICEN[CS]E*", "licen[cs]e*", "Licen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "*USE_POLICY*"]


def leads_out(path: Path) -> bool:
    """Whether `path` is a link to what is neither in its folder nor in the hub's cache that the folder is a snapshot of.

    A folder that came from somewhere may so name any file of this machine, which a copy of it would publish.
    """
    place, home = path.resolve(), path.parent.resolve()
    # Snapshots consist of links: CACHE/models--USER--NAME/snapshots/COMMIT to CACHE/models--USER--NAME/blobs.
    blobs = [(folder.parent / "blobs").resolve() for folder in home.parents if folder.name == "snapshots"]
    # Older versions of the hub's command line link large files of a local folder to there, too.
    in_cache = any(f.name == "blobs" and f.parent.name.startswith("models--") for f in place.parents)
    return not in_cache and not any(place.is_relative_to(allowed) for allowed in [home, *blobs])


def left_where_it_is(path: Path) -> str:
    """The warning of a file that is not copied, for it `leads_out`."""
    return f"{printable(str(path))}: a link that leads out of the folder, not copied. Put the file itself there if it belongs."


def is_companion(path: Path) -> bool:
    """Whether a file of a model's folder goes with the model, by its name."""
    named = path.suffix in SUFFIXES or _LEGAL.fullmatch(path.name) is not None
    return named and not path.name.startswith(".") and path.is_file()

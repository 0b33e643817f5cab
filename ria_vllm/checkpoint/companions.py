"""The small files that go with a model's weights: tokenizer, processor, templates, license. None of them is code.

Some lie in subfolders: more chat templates, and the modules that sentence-transformers puts behind an embedding model,
of which a few have weights of their own.
"""

import json
import re
from pathlib import Path, PurePosixPath

from ria_vllm.errors import RiaError, printable

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# LICENSE, LICENSE-2.0, LICENSE.md, NOTICE, USE_POLICY.md and the like, but no suffix that a program interprets.
_LEGAL = re.compile(
    r"(licen[cs]e|notice|copying|(acceptable_)?use_policy)([-_][\w-]*(\.\d+)*)?(\.(txt|md|rst|html|pdf))?", re.I
)
# The same for the Hub, whose patterns are case-sensitive.
LEGAL_PATTERNS = ["LICEN[CS]E*", "licen[cs]e*", "Licen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "*USE_POLICY*"]

MODULES_FILE = "modules.json"  # of sentence-transformers
TEMPLATES_FOLDER = "additional_chat_templates"


def leads_out(path: Path, folder: Path | None = None) -> bool:
    """Whether `path` is a link to a file outside its folder, and outside the hub's cache if the folder comes from it.

    Args:
        folder: the model's, if the file lies in a subfolder of it.

    A downloaded folder could point such a link at any file on this machine, and a copy of the folder would publish it.
    """
    place, home = path.resolve(), (folder or path.parent).resolve()
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


def nested_companions(folder: Path) -> list[Path]:
    """The files in subfolders that go with the model: more chat templates, and the modules that modules.json names.

    Raises:
        RiaError: modules.json is damaged or names a place outside the folder, or a module has only pickled weights.
    """
    templates = folder / TEMPLATES_FOLDER
    found = sorted(templates.glob("*.jinja")) if templates.is_dir() else []
    for module, kind in _modules(folder):
        there = sorted(module.iterdir()) if module.is_dir() else []  # one without settings has no folder
        weights = [path for path in there if path.suffix == ".safetensors"]
        if not weights and (kind == "Dense" or any(path.suffix == ".bin" for path in there)):
            raise RiaError(
                f"{printable(str(module))}: no safetensors here, though {MODULES_FILE} names it. Pickled weights are "
                "not copied, because they can run code; save the model with a newer sentence-transformers first."
            )
        found += [path for path in there if is_companion(path)] + weights
    return found


def _modules(folder: Path) -> list[tuple[Path, str]]:
    """The subfolders that modules.json names, and the class of each module without its package."""
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    if leads_out(path):
        raise RiaError(left_where_it_is(path))
    try:
        modules = [(entry["path"], entry["type"].rpartition(".")[2]) for entry in json.loads(path.read_text("utf-8"))]
        places = [PurePosixPath(place) for place, _ in modules]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RiaError(f"{path}: not a list of modules with a path and a type. Get the file again.") from None
    for place in places:
        if place.is_absolute() or ".." in place.parts:
            raise RiaError(f"{path}: {printable(str(place))} is not a subfolder of the model. Get the file again.")
    return [(folder / place, kind) for place, (_, kind) in zip(places, modules, strict=True) if place.parts]

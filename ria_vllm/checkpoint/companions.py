"""The small files that go with a model's weights: tokenizer, processor, templates, license. None of them is code.

Some lie in subfolders: more chat templates, and the modules that sentence-transformers puts behind an embedding model,
of which a few have weights of their own.
"""

import re
from pathlib import Path

from ria_vllm.checkpoint.weight_files import INDEX_FILE
from ria_vllm.errors import RiaError, printable
from ria_vllm.format.schema import REPORT_FILE

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# LICENSE, LICENSE-2.0, LICENSE.md, NOTICE, USE_POLICY.md and the like, but no suffix that a program interprets.
_LEGAL = re.compile(
    r"(licen[cs]e|notice|copying|(acceptable_)?use_policy)([-_][\w-]*(\.\d+)*)?(\.(txt|md|rst|html|pdf))?", re.I
)
# The same for the Hub, whose patterns are case-sensitive.
LEGAL_PATTERNS = ["LICEN[CS]E*", "licen[cs]e*", "Licen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "*USE_POLICY*"]

# Written anew for each folder.
NOT_COPIED = ("config.json", INDEX_FILE, "pytorch_model.bin.index.json", REPORT_FILE)
MODULES_FILE = "modules.json"  # of sentence-transformers
TEMPLATES_FOLDER = "additional_chat_templates"


def is_companion(path: Path) -> bool:
    """Whether a file in a model's folder goes with the model, judged by its name."""
    named = path.suffix in SUFFIXES or _LEGAL.fullmatch(path.name) is not None
    return named and not path.name.startswith(".") and path.is_file()


def companions(folder: Path) -> dict[str, Path]:
    """The files besides weights and settings that go with the model in a folder, by their places in it.

    Raises:
        RiaError: one of them is a link out of the folder; or as `nested_companions`.
    """
    there = [path for path in sorted(folder.iterdir()) if is_companion(path) and path.name not in NOT_COPIED]
    found = [check_place_of(path, folder) for path in there + nested_companions(folder)]
    return {path.relative_to(folder).as_posix(): path for path in found}


def check_place_of(path: Path, folder: Path) -> Path:
    """The path of a file in a model's folder.

    Raises:
        RiaError: it is a link out of the folder. A downloaded folder could point such a link at any file on this
            machine, and a copy of the folder would publish it.
    """
    place = path.resolve()
    # Snapshots in the hub's cache consist of links to its blobs, and so do some local folders that it has filled.
    in_cache = any(f.name == "blobs" and f.parent.name.startswith("models--") for f in place.parents)
    if not in_cache and not place.is_relative_to(folder.resolve()):
        name = printable(str(path))
        raise RiaError(f"{name}: a link that leads out of the folder. Copy the file itself there, or remove it.")
    return path


def nested_companions(folder: Path) -> list[Path]:
    """The files in subfolders that go with the model: more chat templates, and what sentence-transformers runs after
    it, in folders such as 1_Pooling and 2_Dense.

    Raises:
        RiaError: one of those has only pickled weights.
    """
    found = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    for module in sorted(folder.glob("[0-9]*_*")) if (folder / MODULES_FILE).is_file() else ():
        there = sorted(module.glob("*"))
        weights = [path for path in there if path.suffix == ".safetensors"]
        if not weights and any(path.suffix == ".bin" for path in there):
            raise RiaError(
                f"{printable(str(module))}: no safetensors here. Pickled weights are not copied, because they can run "
                "code; save the model with a newer sentence-transformers first."
            )
        found += [path for path in there if is_companion(path)] + weights
    return found

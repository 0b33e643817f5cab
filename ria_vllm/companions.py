"""The small files that belong to a model besides its weights: tokenizer, templates, license. None of them is code."""

import re
from pathlib import Path

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# LICENSE, LICENSE-2.0, LICENSE.md, NOTICE, USE_POLICY.md and their like; nothing with a suffix that a program reads.
_LEGAL = re.compile(
    r"(licen[cs]e|notice|copying|(acceptable_)?use_policy)([-_][\w-]*(\.\d+)*)?(\.(txt|md|rst|html|pdf))?", re.I
)
# As the Hub's patterns, which know no "ignore case".
LEGAL_PATTERNS = ["LICEN[CS]E*", "licen[cs]e*", "Licen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "*USE_POLICY*"]


def is_companion(path: Path) -> bool:
    """Whether a file of a model's folder goes with the model, by its name."""
    named = path.suffix in SUFFIXES or _LEGAL.fullmatch(path.name) is not None
    return named and not path.name.startswith(".") and path.is_file()

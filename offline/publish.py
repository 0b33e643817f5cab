"""What a folder that is meant to be published may say of this machine: the last names of paths, no more."""

import os
from pathlib import Path
from typing import Any

# Where transformers, of one version or another, writes from which path it loaded something.
PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")


def published(name: str) -> str:
    """A hub id stays as it is; of a path the last name is left."""
    path = Path(name)
    # A name that is no path may be too long for one, or lead into a folder out of reach: Path.exists() would raise.
    local = os.path.exists(name) or path.is_absolute() or name.startswith((".", "~"))
    return Path(os.path.abspath(path)).name if local else name


def without_paths(content: Any) -> Any:
    """JSON content with `published` names where transformers keeps paths."""
    if isinstance(content, dict):
        return {
            key: published(value) if key in PATH_KEYS and isinstance(value, str) and value else without_paths(value)
            for key, value in content.items()
        }
    return [without_paths(item) for item in content] if isinstance(content, list) else content

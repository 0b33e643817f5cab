"""Removes local paths, except for their last part, from what is written into a folder that may be published."""

import os
from pathlib import Path
from typing import Any

# Keys under which some version of transformers writes the path that it loaded something from.
PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")


def published(name: str) -> str:
    """A hub id unchanged; the last part of a path."""
    path = Path(name)
    # Not Path.exists(), which raises if the name is too long for a path, or if its folder is not readable.
    local = os.path.exists(name) or path.is_absolute() or name.startswith((".", "~"))
    return Path(os.path.abspath(path)).name if local else name


def without_paths(content: Any) -> Any:
    """JSON content with `published` names where transformers writes paths."""
    if isinstance(content, dict):
        return {
            key: published(value) if key in PATH_KEYS and isinstance(value, str) and value else without_paths(value)
            for key, value in content.items()
        }
    return [without_paths(item) for item in content] if isinstance(content, list) else content

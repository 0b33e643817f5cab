"""Reading JSON files that may be damaged, or made to do harm."""

import json
from pathlib import Path
from typing import Any

from ria_vllm.errors import RiaError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RiaError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RiaError(f"{path}: no such file. Is this the right folder?") from None
    # A ValueError: not JSON, not UTF-8, or a number of 5,000 digits.
    except (OSError, ValueError, RecursionError) as error:
        raise RiaError(f"{path}: not readable as JSON ({error}). Get the file again.") from None
    if not isinstance(content, dict):
        raise RiaError(f"{path}: expected a JSON object. Get the file again.")
    return content

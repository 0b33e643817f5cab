"""A text file that is read as a whole."""

from pathlib import Path

from ria_vllm.errors import RiaError


def read_text(path: Path, option: str = "") -> str:
    """The content of a file in UTF-8, whatever the locale.

    Args:
        option: of the command line that named the file, for the error.

    Raises:
        RiaError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RiaError(f"{option} {path}: not readable as text ({error}).".lstrip()) from None

"""Environment variables that are on or off."""

import os

from ria_vllm.errors import RiaError


def is_on(variable: str, default: bool, way: str) -> bool:
    """Whether a variable is 1, and not 0.

    Args:
        default: what it is where it is unset or empty.
        way: what to set it to, for the error.

    Raises:
        RiaError: it has a value that means nothing.
    """
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise RiaError(f"{variable}={value[:80]}: {way}")
    return value == "1" if value else default

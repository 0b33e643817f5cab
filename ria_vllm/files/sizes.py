"""Parses and prints sizes in bytes."""

import re

from ria_vllm.errors import RiaError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "1GiB" or a plain number."""
    found = re.fullmatch(r"(\d+)\s*([KMG]I?)?B?", text.strip().upper())
    if not found or int(found.group(1)) == 0:
        raise RiaError(f"size {text!r}: give a number with KB, MB or GB, such as 5GB.")
    return int(found.group(1)) * UNITS[found.group(2) or ""]


def human_size(size: int) -> str:
    """A size in bytes with three significant digits; MB is 10^6 bytes."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.3g} {unit}"

"""Regular expressions of others' config.json, which is not trusted: some patterns take hours and all memory to match.

What recipes of compressed-tensors write is allowed: characters, classes, repeats of one of these, and groups of
alternatives without repeats around them. Others are refused by name.
"""

import functools
import re

import regex

from ria_vllm.errors import RiaError

LONGEST = 500
"""Characters of a pattern, and of a name."""

SECONDS = 0.1
"""Of computing, for one pattern and one name. Ordinary ones take microseconds."""

_CHARACTER = r"(?: [\w/.-] | \\[.dw/-] | \[\^?(?:[\w/.-]|\\[.dws-])+\] )"
_SEQUENCE = rf"(?: {_CHARACTER} (?: [*+?] | \{{\d{{1,2}}(?:,\d{{0,2}})?\}} )? )*"
_GROUP = rf"\( (?:\?:)? {_SEQUENCE} (?: \| {_SEQUENCE} )* \) \??"
_BRANCH = rf"\^? {_SEQUENCE} (?: {_GROUP} {_SEQUENCE} )* \$?"
_ALLOWED = re.compile(rf"{_BRANCH} (?: \| {_BRANCH} )*", re.VERBOSE)


def check_pattern(pattern: str, where: str) -> None:
    """Check that a pattern may be matched.

    Args:
        where: its file and key, for errors.

    Raises:
        RiaError: it is too long, no regular expression, or one of another kind than recipes write.
    """
    shown = repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")
    if len(pattern) > LONGEST or not _ALLOWED.fullmatch(pattern):
        raise RiaError(
            f"{where}: the pattern {shown} is not read. Only names, with ., classes such as [0-9], repeats of one of "
            f"these and (one|other), of at most {LONGEST} characters, are. Give the linears' names instead."
        )
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise RiaError(f"{where}: {shown} is not a regular expression ({error}). Correct it.") from None


@functools.lru_cache(maxsize=1 << 16)
def matches_pattern(name: str, pattern: str, where: str) -> bool:
    """Whether a pattern that `check_pattern` allows matches the start of `name`.

    Raises:
        RiaError: the name is too long, or it takes too long.
    """
    if len(name) > LONGEST:
        raise RiaError(f"{name[:60]}...: a module's name of {len(name)} characters. The checkpoint is damaged.")
    try:
        return regex.match(pattern, name, timeout=SECONDS) is not None
    except TimeoutError:
        raise RiaError(f"{where}: the pattern {pattern[:60]!r} takes too long to match a name. Shorten it.") from None

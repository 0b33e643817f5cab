"""Regular expressions from untrusted files: compiled only if matching a name cannot take long."""

import re
from collections.abc import Sequence
from typing import Any

from ria_vllm.errors import RiaError

try:
    from re import _constants as ops
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as ops
    import sre_parse as parser

LONGEST = 500
"""Characters of a pattern."""

NAME = 100
"""Characters of a name, for the estimate of `_ways`."""

MOST_WAYS = 10_000_000
"""The most ways to match such a name that may be tried; `.*` three times before the end of a pattern is 1,000,000."""


def compile_pattern(text: str, where: str) -> re.Pattern[str]:
    """The regular expression `text`, for `match` on module names; `where` names its file and key in the error.

    Raises:
        RiaError: it is not a regular expression, is longer than `LONGEST`, refers back to a group, or may try too many
            ways before it fails, as `(a+)+b` does.
    """
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    if len(text) > LONGEST:
        raise RiaError(f"{where}: the pattern {shown} has {len(text)} characters; {LONGEST} are allowed. Shorten it.")
    try:
        parsed = list(parser.parse(text))
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise RiaError(f"{where}: {shown} is not a regular expression ({error}). Correct it.") from None
    # A repeat at the very end takes what it can: nothing follows that could fail.
    if parsed and parsed[-1][0] in REPEATS and _width_one(parsed[-1][1][2]):
        parsed = parsed[:-1]
    try:
        ways = _ways(parsed)
    except KeyError as error:
        raise RiaError(f"{where}: the pattern {shown} has a part ({error.args[0]}) that is not allowed here.") from None
    if ways > MOST_WAYS:
        raise RiaError(
            f"{where}: the pattern {shown} may take forever to match a name. Use fewer repeats (`.*`), and none "
            "inside another."
        )
    return pattern


ASCII = 127
REPEATS = {ops.MAX_REPEAT, ops.MIN_REPEAT, getattr(ops, "POSSESSIVE_REPEAT", None)}


def _ways(items: Sequence[tuple[Any, Any]]) -> int:
    """An upper bound on the ways to match the start of a name; beyond `MOST_WAYS`, any number above it.

    Raises:
        KeyError: an operation that has no such bound.
    """
    ways = 1
    for (operation, argument), following in zip(items, [*items[1:], None]):
        if operation in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN, ops.AT):
            continue
        if operation is ops.SUBPATTERN:
            ways *= _ways(list(argument[3]))
        elif operation in (ops.ASSERT, ops.ASSERT_NOT):
            ways *= _ways(list(argument[1]))
        elif operation is ops.BRANCH:
            branches = [list(branch) for branch in argument[1]]
            starts = {_start(branch) for branch in branches}
            disjoint = None not in starts and len(starts) == len(branches)
            ways *= (max if disjoint else sum)(_ways(branch) for branch in branches)
        elif operation in REPEATS:
            ways *= _ways_of_repeat(*argument, following)
        elif operation is getattr(ops, "ATOMIC_GROUP", None):
            ways *= _ways(list(argument))
        else:
            raise KeyError(str(operation).lower())
        if ways > MOST_WAYS:
            break
    return ways


def _start(branch: Sequence[tuple[Any, Any]]) -> str | None:
    """The character that a branch begins with, in lower case; None if in doubt."""
    operation, argument = branch[0] if branch else (None, None)
    return chr(argument).lower() if operation is ops.LITERAL and argument <= ASCII else None


def _ways_of_repeat(low: int, high: int, repeated: Sequence, following: tuple[Any, Any] | None) -> int:
    if _width_one(repeated) and following is not None and following[0] is ops.LITERAL:
        if not _may_match(repeated[0], following[1]):
            return 1  # it can end in one place only
    once = _ways(list(repeated))
    times = int(high) if high != ops.MAXREPEAT else max(int(low), NAME)
    if once == 1:
        return times + 1
    # With two or more ways each time, thirty times are too many already.
    return sum(once**i for i in range(min(times, 30) + 1))


def _width_one(repeated: Sequence) -> bool:
    return len(repeated) == 1 and repeated[0][0] in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)


def _may_match(item: tuple[Any, Any], literal: int) -> bool:
    """Whether the one-character `item` matches the character `literal`, in upper or lower case; True if in doubt."""
    operation, argument = item
    same = {ord(case) for case in (chr(literal), chr(literal).lower(), chr(literal).upper()) if len(case) == 1}
    if literal > ASCII:
        return True
    if operation is ops.LITERAL:
        return argument in same or argument > ASCII
    if operation is ops.RANGE:
        return any(argument[0] <= code <= argument[1] for code in same) or argument[1] > ASCII
    if operation is ops.CATEGORY and argument is ops.CATEGORY_DIGIT:
        return chr(literal).isdigit()
    if operation is ops.CATEGORY and argument is ops.CATEGORY_WORD:
        return chr(literal).isalnum() or chr(literal) == "_"
    if operation is ops.IN and argument[0][0] is not ops.NEGATE:
        return any(_may_match(choice, literal) for choice in argument)
    if operation is ops.NOT_LITERAL:
        return same != {argument}
    if operation is ops.IN and len(argument) == 2 and argument[1][0] is ops.LITERAL:
        return same != {argument[1][1]}
    return True

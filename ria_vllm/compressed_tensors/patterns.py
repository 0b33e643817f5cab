"""Regular expressions from untrusted files, matched in bounded time.

`re` tries one way to match after another, and a short pattern may have millions. Here a pattern takes all ways at once:
each of its parts turns the set of places in a name that the parts before it may have reached into those that it
reaches itself. Only whether a pattern matches is asked, so it does not matter which way comes first.
"""

import functools
import re
from collections.abc import Callable, Sequence
from re import _compiler as compiler
from re import _constants as ops
from re import _parser as parser
from typing import Any

from ria_vllm.errors import RiaError

LONGEST = 500
"""Characters of a pattern."""

MOST_STEPS = 20_000
"""Parts of a pattern that one match may take, each time that a repeat comes to them; ordinary ones take a few dozen."""


class Walk:
    """A name on its way through a pattern. A set of places is an int: bit i is the place before character i.

    Attributes:
        chars: character -> the places before it.
        found: what is known of the parts that match one character: the places before those that they match.

    Raises:
        RiaError: from `step`, if there were more than `MOST_STEPS`.
    """

    def __init__(self, name: str):
        self.name = name
        self.chars = _places_of(name)
        self.found: dict[re.Pattern[str], int] = {}
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise RiaError("takes too long to match a name. Use fewer repeats inside others")


@functools.lru_cache(maxsize=16)
def _places_of(name: str) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, char in enumerate(name):
        places[char] = places.get(char, 0) | 1 << place
    return places


Part = Callable[[Walk, int], int]
"""From the places before it to those after it."""


class Pattern:
    """A regular expression that is matched from the start of a name, as by `re.match`.

    Args:
        text: the pattern.
        where: its file and key, for errors.

    Raises:
        RiaError: from the constructor and from `match`: it is no regular expression, is longer than `LONGEST`, takes
            too long, or has a part whose result depends on the order of trying, such as a reference to a group.
    """

    def __init__(self, text: str, where: str):
        shown = repr(text if len(text) <= 60 else text[:57] + "...")
        self._shown = f"{where}: the pattern {shown}"
        if len(text) > LONGEST:
            raise RiaError(f"{self._shown} has {len(text)} characters; {LONGEST} are allowed. Shorten it.")
        try:
            parsed = parser.parse(text)
            re.compile(text)
            self._part = _sequence(parsed, parsed.state.flags)
        # A ValueError: flags that exclude each other.
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            raise RiaError(f"{where}: {shown} is not a regular expression ({error}). Correct it.") from None
        except KeyError as error:
            raise RiaError(f"{self._shown} has a part ({error.args[0]}) that is not allowed here.") from None

    def match(self, name: str) -> bool:
        """Whether it matches the start of `name`."""
        try:
            return bool(self._part(Walk(name), 1))
        except RiaError as error:
            raise RiaError(f"{self._shown} {error}.") from None


def _sequence(items: Sequence[tuple[Any, Any]], flags: int) -> Part:
    parts = [_part(operation, argument, flags) for operation, argument in items]

    def follow(walk: Walk, places: int) -> int:
        for part in parts:
            if not places:
                break
            walk.step()
            places = part(walk, places)
        return places

    return follow


def _part(operation: Any, argument: Any, flags: int) -> Part:
    """
    Raises:
        KeyError: an operation whose result depends on the order of trying.
    """
    if operation in WIDTH_ONE:
        before = _before((operation, argument), flags)
        return lambda walk, places: (places & before(walk)) << 1
    if operation is ops.AT:
        at = _compiled((operation, argument), flags)
        return _each(lambda walk, place: at.match(walk.name, place.bit_length() - 1) is not None)
    if operation is ops.FAILURE:
        return lambda walk, places: 0
    if operation is ops.SUBPATTERN:
        _, added, removed, items = argument
        if added & (re.ASCII | re.UNICODE):
            flags &= ~(re.ASCII | re.UNICODE)  # each replaces the other
        return _sequence(items, (flags | added) & ~removed)
    if operation is ops.BRANCH:
        branches = [_sequence(items, flags) for items in argument[1]]
        return lambda walk, places: functools.reduce(int.__or__, [branch(walk, places) for branch in branches])
    if operation in (ops.ASSERT, ops.ASSERT_NOT):
        (direction, items), wanted = argument, operation is ops.ASSERT
        inner = _sequence(items, flags)
        back = items.getwidth()[0] if direction < 0 else 0  # `re` takes only what has one width there
        return _each(lambda walk, place: bool(inner(walk, place >> back)) == wanted)
    if operation in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        low, high, items = argument
        if high != ops.MAXREPEAT:
            return _repeat(low, high, _sequence(items, flags))
        run = _run(items[0], flags) if len(items) == 1 and items[0][0] in WIDTH_ONE else None
        return _repeat(low, None, _sequence(items, flags), run)
    raise KeyError(str(operation).lower())


WIDTH_ONE = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)


def _compiled(item: tuple[Any, Any], flags: int) -> re.Pattern[str]:
    """One part of a pattern by itself, with the meaning that `re` gives it."""
    state = parser.State()
    state.flags = flags
    return compiler.compile(parser.SubPattern(state, [item]))


def _before(item: tuple[Any, Any], flags: int) -> Callable[[Walk], int]:
    """The places before characters that the one-character `item` matches."""
    if item[0] is ops.LITERAL and not flags & re.IGNORECASE:
        char = chr(item[1])
        return lambda walk: walk.chars.get(char, 0)
    one = _compiled(item, flags)

    def before(walk: Walk) -> int:
        if one not in walk.found:
            walk.found[one] = sum(places for char, places in walk.chars.items() if one.match(char))
        return walk.found[one]

    return before


def _run(item: tuple[Any, Any], flags: int) -> Part:
    """Any number of characters that `item` matches."""
    before = _before(item, flags)

    def run(walk: Walk, places: int) -> int:
        # Adding a place to the row of ones that it is in carries to the end of the row.
        ones = before(walk)
        return ((places & ones) + ones ^ ones) | places

    return run


def _each(holds: Callable[[Walk, int], bool]) -> Part:
    """The places where `holds` is true of the place by itself."""

    def each(walk: Walk, places: int) -> int:
        kept = 0
        while places:
            walk.step()
            place = places & -places
            places ^= place
            kept |= place if holds(walk, place) else 0
        return kept

    return each


def _repeat(low: int, high: int | None, inner: Part, run: Part | None = None) -> Part:
    """`inner`, from `low` times to `high` times, or any number of times. `run` is the latter at once from 0 times."""

    def repeat(walk: Walk, places: int) -> int:
        for _ in range(low):
            walk.step()
            before, places = places, inner(walk, places)
            if places in (0, before):  # one more time changes nothing
                break
        if run is not None:
            return run(walk, places)
        reached = new = places
        more = 0
        while new and (high is None or more < high - low):
            walk.step()
            new = inner(walk, new) & ~reached
            reached |= new
            more += 1
        return reached

    return repeat


@functools.lru_cache(maxsize=1024)
def compile_pattern(text: str, where: str) -> Pattern:
    """The regular expression `text`; see `Pattern`."""
    return Pattern(text, where)

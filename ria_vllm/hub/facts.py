"""The facts of a folder: what `compress` or `distill` said of it at the end, and what `eval` and `bench` measured then.

ria_report.json keeps them, and the model card begins with them. Both may be a stranger's, and may hold anything.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ria_vllm.checkpoint.writer import disk_errors, write_whole
from ria_vllm.errors import RiaError, printable
from ria_vllm.files.json_file import read_json
from ria_vllm.files.text_file import read_text
from ria_vllm.format.schema import REPORT_FILE
from ria_vllm.report import MEASURED, VERDICT

CARD_FILE = "README.md"
TASKS, PERPLEXITY, SPEED = "Benchmark tasks", "Perplexity", "Speed"

LENGTH = 300  # of the longest string
_BEGIN, _END = "<!-- ria-vllm: facts -->", "<!-- ria-vllm: end of facts -->"
Row = dict[str, str]  # title of a column -> cell


def facts(report: dict[str, Any]) -> str:
    """The facts in a ria_report.json as the card has them, between marks, so that they can be replaced."""
    verdict, measured = (one if isinstance(one := report.get(key), dict) else {} for key in (VERDICT, MEASURED))
    parts = ["\n".join(f"- {plain(said)}" for said in verdict.values())]
    for title in (TASKS, PERPLEXITY, SPEED):
        found = one if isinstance(one := measured.get(title), dict) else {}
        if rows := _rows(found):
            cells = [tuple(map(plain, row.values())) for row in rows]
            parts += [f"## {title}", card_table(tuple(map(plain, rows[0])), cells), plain(found.get("note", ""))]
    return "\n\n".join([_BEGIN, *filter(None, parts), _END])


def _rows(found: dict[str, Any]) -> list[Row]:
    rows = found.get("rows")
    rows = [row for row in rows if isinstance(row, dict) and row] if isinstance(rows, list) else []
    return [row for row in rows if row.keys() == rows[0].keys()]


def check_card(folder: Path) -> None:
    """Refuse a folder without a card before anything is measured."""
    if not (folder / CARD_FILE).is_file():
        raise RiaError(f"{folder / CARD_FILE}: no model card to note it in. `ria-vllm compress` writes one.")


def add(folder: Path, title: str, rows: Sequence[Row], note: str = "", key: Sequence[str] = ()) -> None:
    """Add to a folder's facts what was measured, in its report and its card. The rest of both stays.

    Args:
        title: TASKS, PERPLEXITY or SPEED. Earlier rows go.
        key: but those stay that differ from the new ones in these columns.

    Raises:
        RiaError: there is no card, or a file cannot be read or replaced.
    """
    check_card(folder)
    path, place = folder / CARD_FILE, folder / REPORT_FILE
    card, report = read_text(path), read_json(place) if place.is_file() else {}
    measured = one if isinstance(one := report.get(MEASURED), dict) else {}
    new = [[row[name] for name in key] for row in rows]
    old = one if isinstance(one := measured.get(title), dict) else {}
    before = [row for row in _rows(old) if key and [row.get(name) for name in key] not in new]
    table: dict[str, Any] = {"rows": [*before, *rows]} | ({"note": note} if note else {})
    report[MEASURED] = measured | {title: table}
    verdict = {VERDICT: report.pop(VERDICT)} if VERDICT in report else {}
    report = verdict | {MEASURED: report.pop(MEASURED)} | report  # in this order
    above, begun, rest = card.partition(_BEGIN)
    _, ended, below = rest.partition(_END)
    if not begun or not ended:
        above, serving, below = card.partition("\n## Serve\n")
        above, below = f"{above.rstrip()}\n\n", f"\n{serving}{below}"
    with disk_errors(folder):
        write_whole(place, json.dumps(report, indent=2) + "\n")
        write_whole(path, f"{above}{facts(report)}{below}")


def add_speed(folder: Path, results: Path) -> None:
    """Add the table of a `bench.md`, if it has one, to a folder's facts.

    Raises:
        RiaError: as `add`.
    """
    lines = [line.strip("| ").split("|") for line in read_text(results).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    if rows := cells[2:]:
        add(folder, SPEED, [dict(zip(cells[0], row, strict=False)) for row in rows])


def card_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def plain(text: Any) -> str:
    """Text on one line, without the characters that Markdown and HTML interpret."""
    return re.sub(r"[`|<>\[\]\\]", " ", one_line(text))


def one_line(text: Any) -> str:
    """One line of at most LENGTH characters.

    Lone surrogates, which JSON allows, are replaced, and control characters are escaped.
    """
    return printable(" ".join(str(text).encode("utf-8", "replace").decode().split()))[:LENGTH]

"""Write the tables of docs/model-families.md from docs/model-families.json: `python -m zoo.table`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.check import SHARE, consumers_that_gather, reasons
from zoo.toy import Toy
from zoo.toys import TOYS

DOCS = Path(__file__).parents[2] / "docs"
PAGE, RESULTS = DOCS / "model-families.md", DOCS / "model-families.json"
# What stands before and after each table.
FAMILIES = "<!-- `make test-zoo` writes what follows -->\n", "<!-- end of what `make test-zoo` writes -->\n"
GATHERING = "<!-- `make test-zoo` writes this table -->\n", "<!-- end of this table -->\n"
HEADER = ("model_type", "pruned", "folded", "gathers", "stays dense", "dense", "pruned and served")


def short(names: list[str]) -> str:
    """Names relative to their layer."""
    ends = sorted({name.rpartition(".*.")[2] if "experts" not in name else _expert(name) for name in names})
    return ", ".join(f"`{end}`" for end in ends)


def _expert(name: str) -> str:
    """As `experts.*.down_proj`."""
    inside = name[name.index("experts") :]
    return inside if ".*" in inside else name.rpartition(".*.")[2]


def difference(found: dict[str, Any] | None) -> str:
    """The largest difference of a log probability, with text and with an image."""
    if not found or "error" in found:
        return "-"
    return ", ".join(
        f"{numbers['largest']:.0e}" + " with an image" * (kind == "image") for kind, numbers in found.items()
    )


def share(pruned: dict[str, Any], toy: Toy) -> str:
    """How much is pruned. If what stays dense for good weighs much, that comes first: the rest is not the model."""
    of_all, of_rest = f"{pruned['share_of_all']:.0%}", f"{pruned['share']:.0%}"
    if pruned["share_of_all"] >= SHARE:
        return f"{of_rest} ({of_all})"
    fixed = [reason for reason in pruned["dense"] if reason in toy.stays_dense.values()]
    return f"{of_all} (stays dense: {', '.join(fixed or pruned['dense'])}; {of_rest} of the rest)"


def row(name: str, record: dict[str, Any]) -> str:
    pruned, toy = record["compress"], TOYS[name]
    dense = "; ".join(f"{reason}: {short(names)}" for reason, names in pruned["dense"].items())
    steps = [difference(record.get(step)) for step in ("dense", "served")]
    served = ["not served: " + toy.not_served, "-"] if toy.not_served else steps
    notes = "; ".join(filter(None, (toy.text_only, toy.shaped, toy.differs)))
    if notes:
        served[0] += f" ({notes})"
    cells = [f"`{name}`", share(pruned, toy), short(pruned["folded"]), short(pruned["gathered"]), dense, *served]
    return "| " + " | ".join(cells) + " |"


def table(records: dict[str, Any]) -> str:
    """The table in Markdown, with a row for each type that was compressed."""
    return _markdown(HEADER, [row(name, record) for name, record in _compressed(records)])


def gathering(records: dict[str, Any]) -> str:
    """The table, in Markdown, of the linears that gather though they do not read the residual stream."""
    types: dict[tuple[str, str], list[str]] = {}
    for name, record in _compressed(records):
        toy = TOYS[name]
        ends = set(consumers_that_gather(toy, record["compress"]["gathered"]).values()) - {None}
        for end in ends:
            types.setdefault((end, reasons(toy)[end]), []).append(f"`{name}`")
    rows = [f"| `{end}` | {why} | {', '.join(found)} |" for (end, why), found in sorted(types.items())]
    return _markdown(("consumer", "why", "model_type"), rows)


def _compressed(records: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(n, r) for n, r in sorted(records.items()) if n in TOYS and "share" in r.get("compress", {})]


def _markdown(header: Sequence[str], rows: list[str]) -> str:
    return "\n".join(["| " + " | ".join(header) + " |", "| --- " * len(header) + "|", *rows]) + "\n"


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its tables written anew; the text around them stays."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
    text = _put(text, GATHERING, gathering(results["types"]))
    return _put(text, FAMILIES, f"Measured with {versions}.\n\n{table(results['types'])}")


def _put(text: str, marks: tuple[str, str], content: str) -> str:
    """The text with this content between the marks."""
    before, _, rest = text.partition(marks[0])
    _, _, after = rest.partition(marks[1])
    return f"{before}{marks[0]}\n{content}\n{marks[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))

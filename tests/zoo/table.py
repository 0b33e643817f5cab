"""Write the table of docs/model-families.md from docs/model-families.json: `python -m zoo.table`."""

import json
from pathlib import Path
from typing import Any

from zoo.check import SHARE
from zoo.toy import Toy
from zoo.toys import TOYS

DOCS = Path(__file__).parents[2] / "docs"
PAGE, RESULTS = DOCS / "model-families.md", DOCS / "model-families.json"
BEGIN, END = "<!-- `make test-zoo` writes what follows -->\n", "<!-- end of what `make test-zoo` writes -->\n"
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
    notes = "; ".join(filter(None, (toy.unlike, toy.text_only, toy.shaped)))
    if notes:
        served[0] += f" ({notes})"
    if toy.unlike and "reference" not in record:  # else it failed, and transformers is what it is compared with
        served[1] += " from vLLM's dense model"
    cells = [f"`{name}`", share(pruned, toy), short(pruned["folded"]), short(pruned["gathered"]), dense, *served]
    return "| " + " | ".join(cells) + " |"


def table(records: dict[str, Any]) -> str:
    """The table in Markdown, with a row for each type that was compressed."""
    rows = [row(name, r) for name, r in sorted(records.items()) if name in TOYS and "share" in r.get("compress", {})]
    return "\n".join(["| " + " | ".join(HEADER) + " |", "| --- " * len(HEADER) + "|", *rows]) + "\n"


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its table written anew; the text around the table stays."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    versions = ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
    return f"{before}{BEGIN}\nMeasured with {versions}.\n\n{table(results['types'])}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))

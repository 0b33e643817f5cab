"""Write docs/lab/model-families.md from docs/lab/model-families.json and the toys: `python -m zoo.table`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.check import ALIKE, SHARE, consumers_that_gather, reasons
from zoo.toy import Toy
from zoo.toys import TOYS

LAB = Path(__file__).parents[2] / "docs" / "lab"
PAGE, RESULTS = LAB / "model-families.md", LAB / "model-families.json"
TEXT = """\
<!-- `make test-zoo` writes this page from docs/lab/model-families.json and tests/zoo. -->

# Model families, measured

`make test-zoo` builds a tiny random model of each type below, compresses, verifies and exports it, and compares vLLM on
the compressed folder with transformers on the exported one. It writes this page, and model-families.json with all
numbers. What `compress` prunes, and how it finds folds, is in [layers.md](layers.md).

Measured with {versions}: {toys} toys of {types} model types. vLLM's CPU build serves {served}
of the toys.

## What gathers

Linears that do not read the residual stream, but have to gather their input, in some layers at least:

{gathering}
## Every family

- **pruned**: the share of the matrices in the decoder's layers that are pruned, not counting those under *stays dense*;
  in brackets, the share of all, in the toy's proportions. If the share of all is less than {share:.0%}, it stands
  first, and the reason after it.
- **folded**, **gathers**: linears whose input arrives permuted because other linears' rows are, and linears that gather
  their input themselves.
- **dense**, **pruned and served**: the largest difference between vLLM and transformers of any token's log probability,
  before and after pruning. Where vLLM's CPU build does not run the dense model, the toy is only compressed, verified
  and exported. Of those with pruned experts, `make test` builds and loads vLLM's model all the same, and compares the
  output of its experts with a product in float64.

Where vLLM computes in bfloat16 only, its rounding could hide small errors in these differences. So vLLM on the
compressed folder is also compared with vLLM on the exported one: most log probabilities are equal bit by bit, and the
median difference may not exceed 1e-3.

Where vLLM and transformers disagree about a dense model on the hub, the toy is shaped, or vLLM is run, so that they
agree. In brackets, the column **dense** says how. If the difference is still more than {alike:.0e}, it says why. What
vLLM does wrong with a dense model, it does wrong with a pruned one, too. Where there is a way out,
[troubleshooting](../troubleshooting.md#serving) has it.

{table}"""
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
    notes = "; ".join(filter(None, (toy.text_only, toy.shaped, toy.run, toy.differs)))
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


def page(results: dict[str, Any]) -> str:
    """All of docs/lab/model-families.md.

    Args:
        results: the content of docs/lab/model-families.json.
    """
    records = results["types"]
    versions = ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
    toys = {name: TOYS[name] for name, _ in _compressed(records)}
    return TEXT.format(
        versions=versions,
        toys=len(toys),
        types=len({toy.model_type or name for name, toy in toys.items()}),
        served=sum(not toy.not_served for toy in toys.values()),
        share=SHARE,
        alike=ALIKE,
        gathering=gathering(records),
        table=table(records),
    )


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text())))

"""`ria-vllm report`: what a compression did, as one HTML page that needs no network and no other file."""

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import click

from ria_vllm.checkpoint import Reader, is_compressed
from ria_vllm.errors import RiaError
from ria_vllm.inventory import Inventory, natural_order, take_inventory
from ria_vllm.json_file import read_json
from ria_vllm.offline.distill.loss import TERMS
from ria_vllm.offline.evaluation.charts import Series, bar_chart, line_chart
from ria_vllm.progress import Monitor
from ria_vllm.report import report_linears, report_number
from ria_vllm.schema import PAGE_FILE, REPORT_FILE, TOPOLOGY
from ria_vllm.sizes import human_size
from ria_vllm.writer import check_file_place, disk_errors, write_whole

WITHOUT_BLOCKS = "retained_without_blocks"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #667; --grid: #e3e5ea; --back: #fff; --panel: #f6f7f9;
        --before: #8a8f99; --after: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #9aa; --grid: #333a44; --back: #15181c;
        --panel: #1d2127; --before: #8a8f99; --after: #fb923c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1000px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, .key { color: var(--soft); } .tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--panel); border-radius: 6px; padding: .7rem 1rem; min-width: 9rem; }
.tile b { display: block; font-size: 1.3rem; } .tile span { color: var(--soft); font-size: .85rem; }
.charts { display: flex; flex-wrap: wrap; gap: .6rem 1rem; } svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; } svg .title { font-weight: 600; font-size: 12px; }
svg .tick { fill: var(--soft); font-size: 10px; } svg .label { font-size: 12px; } .grid { stroke: var(--grid); }
polyline { fill: none; stroke-width: 1.6; } polyline.before { stroke: var(--before); }
polyline.after { stroke: var(--after); } .before { fill: var(--before); } .after { fill: var(--after); }
polyline.before, polyline.after { fill: none; }
i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .8em; }
i.before { background: var(--before); } i.after { background: var(--after); }
table { border-collapse: collapse; font-size: .85rem; } th, td { padding: .15rem .7rem .15rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr + tr td { border-top: 1px solid var(--grid); }
summary { cursor: pointer; } .wide { overflow-x: auto; }
"""


def by_kind(linears: dict[str, dict[str, Any]], before: str, after: str) -> dict[str, list[tuple[int, float, float]]]:
    """Kind of linear (its last name) -> (layer, before, after); entries without both numbers are left out."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for position, name in enumerate(sorted(linears, key=natural_order)):
        first, second = report_number(linears[name], before), report_number(linears[name], after)
        if first is None or second is None or not math.isfinite(first) or not math.isfinite(second):
            continue
        layer = re.search(r"\.(\d+)\.", name)
        found.setdefault(name.rpartition(".")[2], []).append((int(layer[1]) if layer else position, first, second))
    return {kind: sorted(rows) for kind, rows in found.items()}


def charts(
    linears: dict[str, dict[str, Any]], before: str, after: str, labels: tuple[str, str], from_zero: bool
) -> str:
    kinds = by_kind(linears, before, after)
    if not kinds:
        return "<p>The report holds no such figures.</p>"
    drawn = [
        line_chart(
            kind,
            [
                Series(labels[0], "before", [(layer, first) for layer, first, _ in rows]),
                Series(labels[1], "after", [(layer, second) for layer, _, second in rows]),
            ],
            "layer",
            from_zero,
        )
        for kind, rows in kinds.items()
    ]
    legend = f'<p><i class="before"></i>{labels[0]}<i class="after"></i>{labels[1]}</p>'
    return legend + '<div class="charts">' + "".join(drawn) + "</div>"


def tiles(linears: dict[str, dict[str, Any]], inventory: Inventory | None) -> str:
    shown = [(str(len(linears)), "linears pruned")]
    for before, after, label in (
        ("retained_before", "retained_after", "mean retained score"),
        ("error_before", "error_after", "mean output error"),
    ):
        rows = [row for kind in by_kind(linears, before, after).values() for row in kind]
        if rows:
            first, second = (sum(row[i] for row in rows) / len(rows) for i in (1, 2))
            shown.append((f"{first:.4f} → {second:.4f}", label))
    if inventory is not None:
        t = inventory.totals
        shown.append((f"{t.ratio:.3f}", "of the dense size"))
        kinds = [sum(e.permutation == kind for e in inventory.linears) for kind in ("folded", "gathered")]
        shown.append((f"{kinds[0]} + {kinds[1]}", "permutations folded + gathered"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in shown)
        + "</div>"
    )


def sizes(inventory: Inventory) -> str:
    t = inventory.totals
    rows = [
        ("all weights, dense", t.dense_bytes, human_size(t.dense_bytes), "before"),
        ("all weights, as stored", t.bytes, f"{human_size(t.bytes)} ({t.ratio:.3f})", "after"),
        ("pruned linears, dense", t.linear_dense_bytes, human_size(t.linear_dense_bytes), "before"),
        ("pruned linears, as stored", t.linear_bytes, f"{human_size(t.linear_bytes)} ({t.linear_ratio:.3f})", "after"),
    ]
    return "<h2>Size</h2>" + bar_chart("size", rows)


def perplexities(measured: Sequence[dict[str, Any]]) -> str:
    """Bars of the outputs of `ria-vllm eval --json`, in one chart for each text and length of windows."""
    drawn: dict[tuple[str, ...], list[tuple[str, float, str, str]]] = {}
    for entry in measured:
        value = report_number(entry, "perplexity")
        if value is None or not math.isfinite(value):
            raise RiaError(
                "--perplexity: a file without a number named perplexity. Give files of `ria-vllm eval --json`."
            )
        style = "after" if entry.get("compressed") else "before"
        text, *size = (str(entry.get(key, "?")) for key in ("text", "tokens", "seq_len"))
        bar = (Path(str(entry.get("model", "?"))).name, value, f"{value:.2f}", style)
        drawn.setdefault((Path(text).name, *size), []).append(bar)
    found = "<h2>Perplexity</h2>"
    for (text, tokens, window), bars in drawn.items():
        words = f"{text}: {tokens} tokens predicted, in windows of {window}; lower is better."
        found += f"<p>{escape(words)}</p>" + bar_chart("perplexity", bars)
    return found


def recovery(runs: Any) -> str:
    """How each `ria-vllm distill` went: the terms of the loss, and the perplexity of held-out texts, against tokens."""
    drawn: list[str] = []
    titles: list[str] = []
    for number, run in enumerate(runs if isinstance(runs, list) else [], 1):
        points = run.get("curve") if isinstance(run, dict) else None
        points = [point for point in points if isinstance(point, dict)] if isinstance(points, list) else []
        # A term with the weight 0 is not computed: it is 0 throughout.
        terms = {f"loss: {term}": _against_tokens(points, term) for term in TERMS}
        lines = {title: line for title, line in terms.items() if any(value for _, value in line)}
        names = [name for point in points for name in _held_out(point)]
        for name in dict.fromkeys(names):
            scores = [{**_held_out(point).get(name, {}), "tokens": point.get("tokens")} for point in points]
            lines |= {f"{name}: perplexity": _against_tokens(scores, "perplexity")}
            lines |= {f"{name}: KL": _against_tokens(scores, "kl")}
            lines |= {f"{name}: KL of the top k": _against_tokens(scores, "kl_top_k")}
        titles += [title for title, line in lines.items() if line]
        before = f"run {number}, " if len(runs) > 1 else ""
        drawn += [
            line_chart(before + title, [Series(title, "after", line)], "tokens", False)
            for title, line in lines.items()
            if line
        ]
    if not drawn:
        return ""
    words = "Training of the kept weights towards the dense model. KL is the divergence from its predictions, in nats."
    if any(title.endswith("KL of the top k") for title in titles):
        words += " That of the top k compares the k most probable tokens one by one and all others as one: it is"
        words += " smaller than that of all."
    return f'<h2>Recovery</h2><p>{words}</p><div class="charts">{"".join(drawn)}</div>'


def _held_out(point: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = point.get("held_out")
    return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _against_tokens(points: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(report_number(point, "tokens"), report_number(point, key)) for point in points]
    finite = [(x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]
    return sorted(finite)


def recipe_table(recipe: dict[str, Any], dense: Any) -> str:
    rows: dict[str, Any] = {}
    for key, value in recipe.items():
        if key == TOPOLOGY or value in (None, [], ""):
            continue
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):  # run after run
            rows |= {f"{key}, run {number}": entry for number, entry in enumerate(value, 1)}
        else:
            rows[key] = value
    if isinstance(dense, dict) and dense:
        rows["left dense"] = ", ".join(f"{name} ({reason})" for name, reason in dense.items())
    cells = "".join(
        f'<tr><td class="key">{escape(str(key))}</td><td style="text-align:left">{escape(plain(value))}</td></tr>'
        for key, value in rows.items()
    )
    return f"<h2>Recipe</h2><table>{cells}</table>"


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items() if item not in (None, [], ""))
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


def linear_table(linears: dict[str, dict[str, Any]], inventory: Inventory | None) -> str:
    stored = {} if inventory is None else {e.name: e for e in inventory.linears}
    columns = {"retained_before": "retained before", "retained_after": "after"}
    note = ""
    if any(report_number(record, WITHOUT_BLOCKS) is not None for record in linears.values()):
        columns[WITHOUT_BLOCKS] = "without blocks"
        note = (
            "<p>Without blocks: what would be retained if the order did not have to keep to blocks of channels, which "
            "tensor parallelism then divides. Measured in the first layer of each kind that has to.</p>"
        )
    columns |= {"error_before": "error before", "error_after": "after"}
    titles = ("linear", "out x in", "size", "permutation", *columns.values())
    rows = []
    for name in sorted(linears, key=natural_order):
        entry = stored.get(name)
        shape = " x ".join(map(str, entry.shape if entry else linears[name].get("shape") or []))
        cells = [name, shape, human_size(entry.bytes) if entry else "", entry.permutation if entry else ""]
        for key in columns:
            value = report_number(linears[name], key)
            cells.append("" if value is None else f"{value:.4f}")
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{title}</th>" for title in titles)
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    summary = f"<summary>All {len(rows)}</summary>"
    return f'<h2>Linears</h2><details>{summary}{note}<div class="wide">{table}</div></details>'


def page(title: str, content: dict[str, Any], inventory: Inventory | None, measured: Sequence[dict[str, Any]]) -> str:
    """The whole page. `content` is a ria_report.json; nothing in it is trusted, and everything shown is escaped."""
    linears = report_linears(content)
    recipe = content.get("recipe") if isinstance(content.get("recipe"), dict) else {}
    source = escape(str(recipe.get("source", "")))
    parts = [
        f"<h1>{escape(title)}</h1><p>pruned from {source}</p>" if source else f"<h1>{escape(title)}</h1>",
        tiles(linears, inventory),
        perplexities(measured) if measured else "",
        sizes(inventory) if inventory is not None else "",
        "<h2>Retained score</h2><p>Share of the score that the kept weights hold, per linear: what channel permutation "
        "gains. Higher is better.</p>",
        charts(linears, "retained_before", "retained_after", ("before permutation", "after"), False),
        "<h2>Output error</h2><p>Of each linear on the calibration text, relative to its output: what updating the "
        "kept weights gains. Lower is better.</p>",
        charts(linears, "error_before", "error_after", ("before reconstruction", "after"), True),
        recovery(content.get("distill")),
        recipe_table(recipe, content.get("dense")),
        linear_table(linears, inventory),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html><html lang=en><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page. [default: OUT/ria_report.html]")
@click.option(
    "--perplexity", multiple=True, type=click.Path(path_type=Path), help="A file of `eval --json`. Repeatable."
)
def report(out: Path, output: Path | None, perplexity: tuple[Path, ...]) -> None:
    """Write an HTML page that shows what compressing OUT did. It needs no network."""
    target = output or out / PAGE_FILE
    if output:
        check_file_place(output)
    if not (out / REPORT_FILE).is_file():
        raise RiaError(f"{out / REPORT_FILE}: missing. `ria-vllm compress` writes it; copy it beside the weights.")
    content = read_json(out / REPORT_FILE)
    if not report_linears(content):
        raise RiaError(f"{out / REPORT_FILE}: lists no linear. Compress the model again.")
    inventory, monitor = None, Monitor()
    if is_compressed(out):
        with monitor.live():
            inventory = take_inventory(Reader(out), monitor)
    measured = []
    for path in perplexity:
        entry = read_json(path)
        measured.append({**entry, "compressed": is_compressed(Path(str(entry.get("model", ""))))})
    text = page(out.resolve().name, content, inventory, measured)
    with disk_errors(target):
        write_whole(target, text)
    click.echo(f"{target}: {human_size(len(text.encode()))}")

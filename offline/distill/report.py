"""What a finished folder says of its training: in the recipe, in ria_report.json and in the model card."""

from collections.abc import Callable, Sequence
from typing import Any

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.hub.model_card import option_table, pruned_card
from ria_vllm.offline.publish import published
from ria_vllm.report import without_errors


def with_training(reader: Reader, this: dict[str, Any], curve: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of the folder that training started from, with one more training.

    Args:
        this: what the recipe says of it.
        curve: points, see `Course.point`.
    """
    found: dict[str, Any] = {"linears": {}} | without_errors(reader.report())
    recipe = reader.schema.recipe
    runs = recipe | {"distill": [*recipe.get("distill", []), this]}
    return found | {"recipe": runs, "distill": [*found.get("distill", []), {"curve": curve}]}


def card_of(reader: Reader, teacher: str, report: dict[str, Any], warn: Callable[[str], None]) -> str:
    """The model card of the finished folder.

    Args:
        teacher: what the user calls it.
        report: as `with_training` gives it.
    """
    recipe = {key: value for key, value in report["recipe"].items() if key != "distill"}
    recipe = {"source": published(teacher), "pattern": str(reader.schema.pattern)} | recipe
    zeros = reader.schema.sparsity_config.global_sparsity
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

"""What is checked of the texts before anything else, and how long sequences can be."""

from collections.abc import Sequence
from pathlib import Path

from ria_vllm.checkpoint.writer import check_place
from ria_vllm.errors import RiaError
from ria_vllm.offline import digests
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.hf import read_config
from ria_vllm.progress import Monitor


def context_of(folders: Sequence[str]) -> int | None:
    """How many tokens all of these models can read; None if none of them says."""
    found = [getattr(text_config(read_config(name)), "max_position_embeddings", None) for name in folders]
    return min((one for one in found if one), default=None)


def check_texts(out: Path, recipe: Distillation, monitor: Monitor) -> None:
    """Refuse texts that --overwrite would delete, and held-out ones that the report could not tell apart; warn of a
    held-out text that is trained on.

    Raises:
        RiaError: see above.
    """
    training, held_out = Path(recipe.text), list(map(Path, recipe.eval_text))
    files = [path for path in (training, *held_out) if path.is_file()]
    for path in files:
        check_place(out, path)
    names = [path.name for path in held_out]
    for name in names:
        if names.count(name) > 1:
            raise RiaError(f"--eval-text: two files are called {name}, but the report names texts so. Rename one.")
    for path in held_out:
        if training in files and digests.sha256(training) == digests.sha256(path):
            monitor.warn(
                f"--eval-text {path}: this text is trained on, too, so the perplexity and the divergence measured on "
                "it say little about other text, and the step that is kept may not be the best. Give another text."
            )

"""What is checked before the first hour: that teacher, student and options go together, and that training can begin."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import check_place
from ria_vllm.errors import RiaError
from ria_vllm.offline import digests
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.teacher import Origin
from ria_vllm.offline.distill.text import same_tokens
from ria_vllm.offline.model.files.which_weights import meant_weights
from ria_vllm.offline.model.run.architecture import model_class, output_head, text_config
from ria_vllm.offline.model.run.hf import explained, load_tokenizer, read_config
from ria_vllm.progress import Monitor


def outline(name: str) -> Any:
    """The model of a folder or hub id on the meta device, without weights.

    Raises:
        RiaError: transformers cannot build it, or it gives no logits.
    """
    config = read_config(name)
    kind = model_class(name, config)
    with explained(f"{name}: transformers cannot build this model"), torch.device("meta"):
        model: Any = kind._from_config(config)
    if output_head(model) is None:
        raise RiaError(f"{name}: a {kind.__name__} gives no logits of tokens, so it cannot be distilled.")
    return model


def check_models(reader: Reader, origin: Origin) -> None:
    """Check that the teacher's predictions mean the same tokens as the student's.

    Args:
        origin: the teacher.

    Raises:
        RiaError: the teacher's weights are missing, damaged or pickled, or it is unknown which are meant; other tokens,
            or another number of them.
    """
    meant_weights(origin.folder, origin.name)
    mine, dense = outline(str(reader.folder)), outline(str(origin.folder))
    if output_head(mine).weight.shape[0] != output_head(dense).weight.shape[0]:
        raise RiaError(
            f"{reader.folder}: predicts another number of tokens than {origin.name}. Give the model that it was pruned "
            "from as --teacher."
        )
    same_tokens(load_tokenizer(str(origin.folder)), load_tokenizer(str(reader.folder)), (origin.name, reader.folder))


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

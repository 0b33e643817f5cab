"""What is checked before the first hour: that teacher, student and options go together, and that training can begin."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ria_vllm.errors import RiaError
from ria_vllm.offline import digests
from ria_vllm.offline.distill.foreign import ForeignStart
from ria_vllm.offline.distill.origin import Origin
from ria_vllm.offline.distill.outline import outline
from ria_vllm.offline.distill.places import places_of
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.start import Start
from ria_vllm.offline.distill.text import same_tokens
from ria_vllm.offline.model.architecture import output_head, text_config
from ria_vllm.offline.model.hf import load_tokenizer, read_config
from ria_vllm.offline.model.names import Names
from ria_vllm.offline.model.which_weights import meant_weights
from ria_vllm.progress import Monitor
from ria_vllm.writer import check_place


def check_models(start: Start | ForeignStart, origin: Origin, recipe: Distillation, sharded: bool = False) -> None:
    """Check that the teacher's predictions mean the same tokens as the student's, and that the student can be trained.

    Args:
        origin: the teacher.
        sharded: whether the student is to be divided among processes.

    Raises:
        RiaError: the teacher's weights are the student's, missing, damaged or pickled, or it is unknown which are
            meant; other tokens, another number of them, other hidden states if the loss compares them, or a linear that
            cannot be trained.
    """
    meant_weights(origin.folder, origin.name)
    if digests.of_weights(origin.folder) == digests.of_weights(start.folder):
        raise RiaError(
            f"{origin.name}: has the weights of {start.folder}, so there is nothing to learn from it. Give the dense "
            "model that it was pruned from as --teacher."
        )
    teacher, mine, dense = origin.name, outline(str(start.folder)), outline(str(origin.folder))
    places = places_of(mine, start, Names(mine, start.dense_names(), start.folder))
    experts = next((place.names[0] for place in places.values() if place.stacked), None)
    if sharded and experts is not None:
        raise RiaError(
            f"--shard: {start.folder} has pruned experts ({experts} and others), which are not divided among "
            "processes. Leave out --shard: each process then has the whole model."
        )
    if output_head(mine).weight.shape[0] != output_head(dense).weight.shape[0]:
        raise RiaError(
            f"{start.folder}: predicts another number of tokens than {teacher}. Give the model that it was pruned from "
            "as --teacher."
        )
    if recipe.loss.hidden:
        for key in ("num_hidden_layers", "hidden_size"):
            one, other = (getattr(text_config(model.config), key, None) for model in (mine, dense))
            if one != other:
                raise RiaError(
                    f"--loss hidden: {teacher} has {key} {other}, {start.folder} has {one}, so their hidden states "
                    "cannot be compared. Leave hidden out."
                )
    same_tokens(load_tokenizer(str(origin.folder)), load_tokenizer(str(start.folder)), (teacher, start.folder))


def context_of(names: Sequence[str]) -> int | None:
    """How many tokens all of these models can read; None if none of them says."""
    found = [getattr(text_config(read_config(name)), "max_position_embeddings", None) for name in names]
    return min((one for one in found if one), default=None)


def fitting(recipe: Distillation, models: Sequence[str], monitor: Monitor) -> Distillation:
    """The recipe with sequences that the models can read."""
    longest = context_of(models)
    if longest is None or recipe.seq_len <= longest:
        return recipe
    monitor.warn(f"--seq-len {recipe.seq_len}: these models read at most {longest} tokens, so sequences are as long.")
    return replace(recipe, seq_len=longest)


def check_texts(out: Path, recipe: Distillation) -> None:
    """Refuse texts that --overwrite would delete, and held-out ones that the report could not tell apart.

    Raises:
        RiaError: see above.
    """
    held_out = list(map(Path, recipe.eval_text))
    for path in (Path(recipe.text), *held_out):
        if path.is_file():
            check_place(out, path)
    names = [path.name for path in held_out]
    for name in names:
        if names.count(name) > 1:
            raise RiaError(f"--eval-text: two files are called {name}, but the report names texts so. Rename one.")


def warn_of_trained_texts(recipe: Distillation, monitor: Monitor) -> None:
    """Warn of a held-out text that is trained on."""
    training = Path(recipe.text)
    for path in map(Path, recipe.eval_text):
        if training.is_file() and path.is_file() and _same_content(training, path):
            monitor.warn(
                f"--eval-text {path}: this text is trained on, too, so the perplexity and the divergence measured on "
                "it say little about other text, and the step that is kept may not be the best. Give another text."
            )


def warn_of_the_same_windows(recipe: Distillation, story: Mapping[str, Any], folder: Path, monitor: Monitor) -> None:
    """Warn if the folder was distilled on windows that this run draws, or lets the teacher write, again.

    Args:
        story: the recipe of the folder, which another program may have written.
    """
    earlier, name = story.get("distill"), Path(recipe.text).name
    for run in earlier if isinstance(earlier, list) else []:
        if isinstance(run, dict) and (run.get("text"), run.get("seed")) == (name, recipe.seed):
            monitor.warn(
                f"{folder} was trained on {name} with --seed {recipe.seed} already, so it has read much of what it "
                "would read now. New text is worth more: give another --seed."
            )
            return


def _same_content(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and digests.sha256(one) == digests.sha256(other)

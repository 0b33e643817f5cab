"""Whether the parts of a checkpoint belong together: config.json, permutations and weight files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ria_vllm.checkpoint.weight_files import file_metadata
from ria_vllm.errors import RiaError
from ria_vllm.format import permutation
from ria_vllm.format.int8_rows import INTEGERS, TENSORS
from ria_vllm.format.schema import DIGESTS, PERMUTATIONS_FILE, RiaSchema


def check_prefix(stored: Iterable[str], schema: RiaSchema, prefix: str, where: str | Path) -> None:
    """Check that no weight is stored both with and without a prefix that loaders add and strip: either could be loaded.

    Args:
        stored: all tensors' names; those of a linear that is pruned, or in int8, stand for its weight.
        prefix: with its dot, as "model.".

    Raises:
        RiaError: two names become one without the prefix.
    """
    stored = list(stored)
    pruned = {name.rpartition(".")[0] for name in stored if name.endswith((".compressed", f".{INTEGERS}"))}
    parts = {*schema.tensor_names, *TENSORS}
    found: dict[str, str] = {}
    for name in stored:
        layer, _, part = name.rpartition(".")
        weight = f"{layer}.weight" if layer in pruned and part in parts else name
        other = found.setdefault(weight.removeprefix(prefix), weight)
        if other != weight:
            raise RiaError(
                f"{where}: {other} and {weight} are both stored, but they are one weight. Get the weight files again."
            )


def check_digests(
    schema: RiaSchema, permutations: permutation.Permutations, files: Iterable[Path], where: str | Path
) -> None:
    """Check that config.json, permutations and weight files are of one run. Otherwise weights would be read under
    the wrong permutation, or be those of two models.

    Args:
        permutations: linear's name -> permutation, all that the checkpoint has; each has passed `permutation.check`.
        files: the weight files that are there.
        where: the folder or repository, for messages.

    Raises:
        RiaError: names the file that does not fit.
    """
    expected = schema.permutations_digest
    again = "Get all files of one run, or compress the model again."
    if not schema.permutes and (expected is not None or permutations):
        raise RiaError(
            f"{where}: it has permutations, though the recipe in config.json says that there are none. {again}"
        )
    if schema.permutes and permutation.digest(permutations) != expected:
        raise RiaError(f"{where}: {PERMUTATIONS_FILE} is from another run than config.json. {again}")
    for path in sorted(set(files)):
        check_file_digest(schema, file_metadata(path), path)


def check_file_digest(schema: RiaSchema, metadata: Mapping[str, str], where: str | Path) -> None:
    """Check by the `__metadata__` of its header that a weight file is of the run that wrote config.json.

    Raises:
        RiaError: it is not; `where` names the file.
    """
    if metadata.get(DIGESTS["permutations_digest"]) != schema.permutations_digest:
        raise RiaError(
            f"{where}: its weights are not stored under the permutations that config.json names. Get all files of one "
            "run, or compress the model again."
        )
    if metadata.get(DIGESTS["weights_digest"]) != schema.weights_digest:
        raise RiaError(
            f"{where}: it is from another run than config.json. Get all files of one run, or compress the model again."
        )

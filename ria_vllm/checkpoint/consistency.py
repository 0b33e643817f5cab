"""Whether the parts of a checkpoint belong together: config.json, permutations and weight files."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ria_vllm.checkpoint.weight_files import file_metadata
from ria_vllm.errors import RiaError
from ria_vllm.format import permutation
from ria_vllm.format.int8_rows import INTEGERS, TENSORS
from ria_vllm.format.layer_schema import Producer
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
    schema: RiaSchema, permutations: permutation.Orders, files: Iterable[Path], where: str | Path
) -> None:
    """Check that config.json, permutations and weight files are of one run. Otherwise weights would be read in the
    wrong order, or be those of two models.

    Args:
        permutations: linear's name -> order, all that the checkpoint has; each has passed `permutation.check`.
        files: the weight files that are there.
        where: the folder or repository, for messages.

    Raises:
        RiaError: names the file that does not fit.
    """
    expected = schema.permutations_digest
    again = "Get all files of one run, or compress the model again."
    if schema.permutes and expected is None:
        raise RiaError(
            f"{where}: config.json has no permutations_digest (older versions did not write one), so nothing shows "
            "that the permutations belong to the weights. Compress the model again."
        )
    if not schema.permutes and (expected is not None or permutations):
        raise RiaError(
            f"{where}: it has permutations, though the recipe in config.json says that there are none. {again}"
        )
    if expected is not None and permutation.digest(permutations) != expected:
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


def problems_of_folds(
    schema: RiaSchema,
    permutations: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, int]],
    sparse: set[str],
) -> Iterator[str]:
    """What is wrong with the folds that hold, in sentences.

    Args:
        permutations: linear's name -> order of its columns, integers [in].
        shapes: name -> [out, in] of the pruned linears that could be read.
        sparse: the names of all pruned linears.
    """
    claimed: dict[str, torch.Tensor] = {}  # producer -> which rows folds reorder, bool
    for name, fold, producers in schema.active_folds(permutations, sparse):
        try:
            orders = fold.row_orders(permutations[name])
        except ValueError as error:
            yield f"{name}: its permutation cannot be folded into attention heads: {error}"
            continue
        for producer, order in zip(producers, orders, strict=True):
            if producer.name not in shapes:
                continue
            total = shapes[producer.name][0]
            wrong = _row_problem(name, producer, total, len(order))
            if wrong:
                yield wrong
                continue
            mine = torch.zeros(total, dtype=torch.bool)
            mine[permutation.places(total, *(producer.rows or (0, total)), producer.blocks)] = True
            taken = claimed.setdefault(producer.name, torch.zeros_like(mine))
            if bool((taken & mine).any()):
                yield f"{name}: its fold reorders rows of {producer.name} that another fold reorders too"
            taken |= mine


def _row_problem(consumer: str, producer: Producer, rows: int, size: int) -> str | None:
    """What is wrong with the rows of a producer that a fold reorders, `size` of `rows`."""
    start, end = producer.rows or (0, rows)
    try:
        places = permutation.places(rows, start, end, producer.blocks)
    except ValueError:
        of_each = f" of each of {producer.blocks} blocks" if producer.blocks > 1 else ""
        return f"{consumer}: its fold names rows {start} to {end}{of_each} of {producer.name}, which has {rows}"
    if len(places) != size:
        return f"{consumer}: its fold reorders {size} rows, but {producer.name} gives it {len(places)}"
    return None

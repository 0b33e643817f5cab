"""Reading a compressed checkpoint, one tensor at a time. Nothing in it is trusted."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ria_vllm import permutation, rotation
from ria_vllm.errors import RiaError
from ria_vllm.layer_schema import Producer
from ria_vllm.open_files import OpenFiles
from ria_vllm.progress import Monitor
from ria_vllm.schema import (
    DIGESTS,
    PERMUTATION_SUFFIX,
    PERMUTATIONS_FILE,
    QUANT_METHOD,
    REPORT_FILE,
    ROTATIONS_FILE,
    ROTATIONS_SUFFIX,
    RiaSchema,
)
from ria_vllm.stacks import problems_of_experts, stack_experts, stacked_tensors
from ria_vllm.weight_format import SHAPE, WeightFormat

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MISTRAL_FILES = "consolidated*.safetensors"
LONGEST_NAME = 1000
DEEPEST_JSON = 50  # levels; code that walks through it may recurse


@dataclass(frozen=True)
class SparseLinear:
    """One pruned linear, checked.

    Attributes:
        format: what its parts mean.
        parts: its stored tensors by the last part of their names, `shape` left out.
        input_permutation: integers [in], the order of its columns; None: the model's own.
        dtype: of the dense weight.
        rotations: float32 [kv heads, d, d], how the heads that it reads are turned; None: they are not.
    """

    name: str
    format: WeightFormat
    parts: Mapping[str, torch.Tensor]
    input_permutation: torch.Tensor | None
    dtype: torch.dtype
    rotations: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        bitmask = self.parts["bitmask"]
        return bitmask.shape[0], bitmask.shape[1] * 8

    def stored(self) -> torch.Tensor:
        """Dense [out, in], columns in the stored order."""
        return self.format.decode(self.parts, self.dtype)

    def dense(self) -> torch.Tensor:
        """Dense [out, in], columns in the model's own order."""
        stored, p = self.stored(), self.input_permutation
        return stored if p is None else stored[:, permutation.invert(p).long()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that stores it, by full names; the permutation, int32, and rotations as `CheckpointWriter.finish` expects
        them."""
        found = {f"{self.name}.{part}": tensor for part, tensor in self.parts.items()}
        found[f"{self.name}.{SHAPE}"] = torch.tensor(self.shape, dtype=torch.int64).view(2, 1)
        if self.input_permutation is not None:
            found[f"{self.name}{PERMUTATION_SUFFIX}"] = self.input_permutation.to(torch.int32)
        if self.rotations is not None:
            found[f"{self.name}{ROTATIONS_SUFFIX}"] = self.rotations
        return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RiaError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise RiaError(f"{path}: no such file. Is this the right folder?") from None
    # A ValueError: not JSON, not UTF-8, or a number of 5,000 digits.
    except (OSError, ValueError, RecursionError) as error:
        raise RiaError(f"{path}: not readable as JSON ({error}). Get the file again.") from None
    if not isinstance(content, dict):
        raise RiaError(f"{path}: expected a JSON object. Get the file again.")
    level: list[Any] = [content]
    for _ in range(DEEPEST_JSON):
        level = [
            c
            for node in level
            for c in (node.values() if isinstance(node, dict) else node)
            if isinstance(c, dict | list)
        ]
        if not level:
            return content
    raise RiaError(f"{path}: more than {DEEPEST_JSON} levels of JSON. Do not use this checkpoint.")


def is_compressed(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint that ria-vllm wrote."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    quantization = read_json(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single weight file of a Hugging Face folder.

    Raises:
        RiaError: no weights; a shard that is missing, truncated or outside the folder; a tensor missing from its shard.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / SINGLE_FILE).is_file():
            shards = unindexed_files(folder)
            beside = f" There is {shards[0]}: if it is a shard of this model, get {INDEX_FILE}, too." if shards else ""
            raise RiaError(f"{folder}: no weights here (neither {SINGLE_FILE} nor {INDEX_FILE}).{beside}")
        return dict.fromkeys(tensor_names(folder / SINGLE_FILE), folder / SINGLE_FILE)
    weight_map = read_index(index, folder)
    present: dict[str, set[str]] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            lost = next(name for name, shard in weight_map.items() if shard == file)
            raise RiaError(f"{folder / file}: shard missing (it holds {lost}). Get the file again.")
        present[file] = set(tensor_names(folder / file))
    for name, file in weight_map.items():
        if name not in present[file]:
            raise RiaError(f"{folder / file}: tensor {name} missing, though the index names it. Get the file again.")
    return {name: folder / file for name, file in weight_map.items()}


def unindexed_files(folder: Path) -> list[str]:
    """Names of the files that vLLM takes for a folder's weights where there is no index."""
    return weights_among(path.name for path in folder.iterdir())


def weights_among(files: Iterable[str]) -> list[str]:
    """Those of a folder's or repository's files that vLLM takes for weights where there is no index, sorted."""
    return sorted(
        name
        for name in files
        if name.endswith(".safetensors") and "/" not in name and not name.startswith(".") and name != PERMUTATIONS_FILE
    )


def files_below(folder: Path) -> list[str]:
    """Paths of all files of a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def mistral_files(files: Iterable[str], own: Iterable[str], where: str | Path) -> str | None:
    """Why vLLM would not read the weight files of a folder or repository; None if it would.

    With `--load-format auto`, it takes it for one in Mistral's own format if any file has the name of such weights. It
    then reads only those, whatever the index says.

    Args:
        files: paths of all files, relative to the folder or repository.
        own: names of the weight files. If all of them have such names, vLLM reads them.
    """
    found = sorted(name for name in files if fnmatchcase(name.rpartition("/")[2], MISTRAL_FILES))
    if not found or set(found) == set(own):
        return None
    name = next((name for name in found if name not in set(own)), found[0])
    return (
        f"{where}: {name} makes vLLM take this model for one in Mistral's own format: it would read only files of such "
        'names. Remove it, or download the model without it (`hf download --exclude "*consolidated*"`).'
    )


def read_index(path: Path, where: str | Path) -> dict[str, str]:
    """Tensor name -> name of its shard, from an index of weight files; `where` names the folder or repository.

    Raises:
        RiaError: the index is damaged, or names a shard outside the folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise RiaError(f"{where}: no usable weight_map in {INDEX_FILE}. Get the file again.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.isprintable() or len(file.encode()) > 255:
            raise RiaError(
                f"{where}: {INDEX_FILE}: shard {file!r} lies outside the folder. Do not use this checkpoint."
            )
    return weight_map


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        RiaError: the file is truncated or broken, or a name cannot be printed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise RiaError(f"{path}: broken or truncated safetensors file ({error}). Get the file again.") from None
    for name in names:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise RiaError(f"{path}: {name[:80]!r} is not a valid tensor name. Do not use this checkpoint.")
    return names


def check_prefix(stored: Iterable[str], schema: RiaSchema, prefix: str, where: str | Path) -> None:
    """Check that no weight is stored both with and without a prefix that loaders add and strip: either could be loaded.

    Args:
        stored: all tensors' names; those of a pruned linear stand for its weight.
        prefix: with its dot, as "model.".

    Raises:
        RiaError: two names become one without the prefix.
    """
    stored = list(stored)
    pruned = {name.removesuffix(".compressed") for name in stored if name.endswith(".compressed")}
    found: dict[str, str] = {}
    for name in stored:
        layer, _, part = name.rpartition(".")
        weight = f"{layer}.weight" if layer in pruned and part in schema.tensor_names else name
        other = found.setdefault(weight.removeprefix(prefix), weight)
        if other != weight:
            raise RiaError(
                f"{where}: {other} and {weight} are both stored, but they are one weight. Get the weight files again."
            )


def file_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file's header; empty where it has none."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RiaError(f"{path}: broken or truncated safetensors file ({error}). Get the file again.") from None


def load_permutations(path: Path) -> dict[str, torch.Tensor]:
    """Linear's name -> its order, integers [in], each a permutation of 0..in-1.

    Raises:
        RiaError: file and layer named.
    """
    return _load_named(path, PERMUTATION_SUFFIX, lambda p: permutation.check(p, p.numel()), "a permutation")


def load_rotations(path: Path) -> dict[str, torch.Tensor]:
    """Linear that reads turned heads -> float32 [kv heads, d, d], see `ria_vllm.rotation`.

    Raises:
        RiaError: file and layer named.
    """
    return _load_named(path, ROTATIONS_SUFFIX, rotation.check, "rotations")


def _load_named(
    path: Path, suffix: str, check: Callable[[torch.Tensor], str | None], what: str
) -> dict[str, torch.Tensor]:
    """Linear's name -> its tensor, from a file in which all names end with `suffix`.

    Args:
        check: why a tensor is not what it should be; None if it is.
        what: it should be.

    Raises:
        RiaError: file and layer named.
    """
    found: dict[str, torch.Tensor] = {}
    files = OpenFiles()
    for stored in tensor_names(path):
        name = stored.removesuffix(suffix)
        if name == stored:
            raise RiaError(f"{path}: {stored}: unknown name. Get the file again.")
        found[name] = files.tensor(path, stored)
        wrong = check(found[name])
        if wrong:
            raise RiaError(f"{path}: {name}: not {what}: {wrong}. Get the file again.")
    return found


def checked_rotations(
    path: Path | None, schema: RiaSchema, is_pruned: Callable[[str], bool], where: str | Path
) -> dict[str, torch.Tensor]:
    """`load_rotations`, checked against config.json.

    Args:
        path: None if the file is not there.
        where: the folder or repository, for messages.

    Raises:
        RiaError: the file is missing, damaged or of another run, or has rotations of what is no pair of pruned linears.
    """
    again = "Get all files of one run, or compress the model again."
    if path is None:
        raise RiaError(f"{where}: {ROTATIONS_FILE} is missing, though config.json says that heads were turned. {again}")
    found = load_rotations(path)
    if rotation.digest(found) != schema.rotations_digest:
        raise RiaError(f"{where}: {ROTATIONS_FILE} is from another run than config.json. {again}")
    for name, rotations in found.items():
        fold = schema.fold_of(name)
        pair = [] if fold is None else [name, *(producer.name for producer in fold.producers_of(name))]
        if fold is None or fold.coupling != "heads" or len(pair) != 2 or not all(map(is_pruned, pair)):
            raise RiaError(f"{path}: {name}: config.json has no fold by heads from one pruned linear to it. {again}")
        if len(rotations) != fold.num_kv_heads:
            raise RiaError(
                f"{path}: {name}: {len(rotations)} rotations, but its fold has {fold.num_kv_heads} key-value heads. "
                f"{again}"
            )
    return found


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


def not_finite(tensor: torch.Tensor) -> str | None:
    """What is wrong with the values as numbers, or None."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return None
    try:
        finite = (tensor.float() if tensor.itemsize == 1 else tensor).isfinite()
    except RuntimeError:  # torch can store this dtype and nothing else
        return f"its dtype {tensor.dtype} cannot be checked"
    return None if bool(finite.all()) else "a value is NaN or infinite"


def checked_linear(
    name: str, parts: Mapping[str, torch.Tensor], p: torch.Tensor | None, schema: RiaSchema, where: str | Path
) -> SparseLinear:
    """A pruned linear from its tensors.

    Args:
        parts: by the last part of their names, which `schema.tensor_names` lists.
        p: the order of its columns, None where it is the model's own.
        where: the file or folder, for messages.

    Raises:
        RiaError: a tensor is missing, or breaks a rule of the format.
    """
    for part in schema.tensor_names:
        if part not in parts:
            raise RiaError(f"{where}: {name}.{part} is missing. Get the weight files again.")
    shape = parts[SHAPE]
    if shape.dtype != torch.int64 or shape.numel() != 2:
        raise RiaError(f"{where}: {name}.shape is not two int64 numbers. Get the file again.")
    weight_format = schema.weight_format
    wrong = weight_format.check(parts, tuple(shape.flatten().tolist()))
    if wrong:
        raise RiaError(
            f"{where}: {name}: {wrong}. The file is damaged, or config.json is another model's; get both again."
        )
    wrong = None if p is None else permutation.check(p, parts["bitmask"].shape[1] * 8)
    if wrong:
        raise RiaError(f"{where}: {name}: not a permutation: {wrong}. Get {PERMUTATIONS_FILE} again.")
    stored = {part.name: parts[part.name] for part in weight_format.parts}
    dtype = getattr(torch, schema.weights.dtype) if schema.weights else stored["compressed"].dtype
    return SparseLinear(name, weight_format, stored, p, dtype)


def _what_works(quantization: Any) -> str:
    """What can be done with a folder that another program wrote, in one sentence or none."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return ""
    return (
        " It is one of compressed-tensors: `vllm serve` takes it with ria-vllm's plugin, if it is 2:4 in a format that "
        "README.md lists, but `inspect`, `verify` and `export` do not read it."
    )


class Reader:
    """A compressed checkpoint folder. Opening it reads only headers and the permutations.

    Raises:
        RiaError: from the constructor and from every method, naming file and layer.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._open = OpenFiles()
        self.config = read_json(self.folder / "config.json")
        quantization = self.config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
            raise RiaError(f"{self.folder}: not a folder that `ria-vllm compress` wrote.{_what_works(quantization)}")
        self.schema = RiaSchema.parse(quantization, str(self.folder / "config.json"))
        self.files = weight_files(self.folder)
        self._check_strays()
        self.sparse_names = [n.removesuffix(".compressed") for n in self.files if n.endswith(".compressed")]
        for name in self.files:
            layer, _, part = name.rpartition(".")
            if part == "bitmask" and f"{layer}.compressed" not in self.files:
                raise RiaError(f"{self.folder}: {layer}.compressed is missing. Get the weight files again.")
            if part == "compressed" and f"{layer}.weight" in self.files:
                raise RiaError(
                    f"{self.folder}: {layer} is stored both dense and compressed. Get the weight files again."
                )
            if name.endswith(PERMUTATION_SUFFIX):
                raise RiaError(f"{self.files[name]}: {name} does not belong here, but in {PERMUTATIONS_FILE}.")
        for path in set(self.files.values()):
            for name in tensor_names(path):
                if self.files.get(name) != path:
                    raise RiaError(f"{path}: the index does not say that {name} is here. Get the files of one run.")
        if not self.sparse_names:
            raise RiaError(f"{self.folder}: no pruned linear in it.")
        check_prefix(self.files, self.schema, "model.", self.folder)
        path = self.folder / PERMUTATIONS_FILE
        if self.schema.permutes and not path.is_file():
            raise RiaError(f"{path}: missing, though the model was compressed with permutations. Get the file again.")
        self.permutations = load_permutations(path) if path.is_file() else {}
        for name in sorted(set(self.permutations) - set(self.sparse_names)):
            raise RiaError(f"{path}: a permutation for {name}, which is not a pruned linear of this model.")
        check_digests(self.schema, self.permutations, self.files.values(), self.folder)
        self.rotations = self._rotations()

    def _rotations(self) -> dict[str, torch.Tensor]:
        if self.schema.rotations_digest is None:
            return {}
        path = self.folder / ROTATIONS_FILE
        is_pruned = set(self.sparse_names).__contains__
        return checked_rotations(path if path.is_file() else None, self.schema, is_pruned, self.folder)

    @property
    def permuted_names(self) -> list[str]:
        return list(self.permutations)

    def _check_strays(self) -> None:
        """Refuse files of other weights that would be loaded along with ours, or in their place.

        Without an index, vLLM reads all files. transformers prefers the single file to an index.
        """
        indexed = (self.folder / INDEX_FILE).is_file()
        own = {path.name for path in self.files.values()}
        if taken := mistral_files(files_below(self.folder), own, self.folder):
            raise RiaError(taken)
        for name in unindexed_files(self.folder):
            if name not in own and (name == SINGLE_FILE or not indexed):
                raise RiaError(
                    f"{self.folder / name}: does not belong to {INDEX_FILE if indexed else SINGLE_FILE}, but would be "
                    "loaded. Remove it, or get all files of one run."
                )

    @property
    def dense_names(self) -> list[str]:
        """Tensors stored as they are (embeddings, norms, biases, linears left dense)."""
        own = {f"{name}.{part}" for name in self.sparse_names for part in self.schema.tensor_names}
        return [name for name in self.files if name not in own]

    def tensor(self, name: str) -> torch.Tensor:
        return self._open.tensor(self.files[name], name)

    def linear(self, name: str) -> SparseLinear:
        """Load and check one pruned linear."""
        stored = {part: f"{name}.{part}" for part in self.schema.tensor_names}
        parts = {part: self.tensor(key) for part, key in stored.items() if key in self.files}
        where = self.files.get(stored["compressed"], self.folder)
        linear = checked_linear(name, parts, self.permutations.get(name), self.schema, where)
        return replace(linear, rotations=self.rotations.get(name))

    def dense_tensors(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Name -> what makes it, for every tensor of the dense model: in the model's own channel order, experts stacked
        as its files have them. In the order of the files.

        Raises:
            RiaError: an expert is missing, or a tensor is there twice.
        """
        sparse = set(self.sparse_names)
        stacks = stacked_tensors(self.schema, sparse, self.folder)
        in_stack = {name: tensor for tensor, (layer, stack) in stacks.items() for name in layer.rows(stack)}
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for name in sorted(self.files, key=lambda name: (self.files[name], name)):
            linear, _, part = name.rpartition(".")
            if linear not in sparse or part not in self.schema.tensor_names:
                if name in stacks or name.removesuffix(".weight") in sparse:
                    raise RiaError(f"{self.folder}: {name} is stored dense and pruned. Get the weight files again.")
                found[name] = partial(self.tensor, name)
            elif linear in in_stack:
                tensor = in_stack[linear]
                found.setdefault(tensor, partial(stack_experts, *stacks[tensor], self.dense, self.folder))
            else:
                found[f"{linear}.weight"] = partial(self.dense, linear)
        return found

    def pruned_tensors(self) -> set[str]:
        """The tensors of the dense model that hold pruned linears, by their names in its files.

        Raises:
            RiaError: an expert is missing, or a tensor is there twice.
        """
        return self.dense_tensors().keys() - set(self.dense_names)

    def dense(self, name: str) -> torch.Tensor:
        """The weight of a pruned linear [out, in], in the model's own order."""
        return self.linear(name).dense()

    def report(self) -> dict[str, Any]:
        """What `compress` measured; empty where the report was not kept."""
        path = self.folder / REPORT_FILE
        return read_json(path) if path.is_file() else {}

    def problems(self, monitor: Monitor | None = None) -> Iterator[str]:
        """Every broken invariant, in a sentence that names the layer. Reads the checkpoint one linear at a time."""
        monitor = monitor or Monitor(shown=False)
        sparse = set(self.sparse_names)
        rows: dict[str, int] = {}
        shapes: dict[str, tuple[int, int]] = {}
        permutations: dict[str, torch.Tensor] = {}
        claimed: dict[str, torch.Tensor] = {}  # producer -> which rows folds reorder, bool
        for name in monitor.steps(self.sparse_names, "checking pruned linears", len(self.sparse_names)):
            if self.schema.ignored(name):
                yield f"{name}: listed as ignored in config.json, but stored compressed"
            try:
                linear = self.linear(name)
            except RiaError as error:
                yield str(error)
                continue
            rows[name] = linear.shape[0]
            shapes[name] = linear.shape
            if linear.input_permutation is not None:
                permutations[name] = linear.input_permutation
            for part, tensor in linear.parts.items():
                wrong = not_finite(tensor)
                if wrong:
                    yield f"{self.files[f'{name}.{part}']}: {name}: {wrong}"
        yield from problems_of_experts(self.schema, shapes, sparse)
        yield from self._problems_of_rotations(shapes)
        for name, fold, producers in self.schema.active_folds(permutations, sparse):
            orders = fold.row_orders(permutations[name])
            if isinstance(orders, str):
                yield f"{name}: its permutation cannot be folded into attention heads: {orders}"
                continue
            for producer, order in zip(producers, orders, strict=True):
                if producer.name not in rows:
                    continue
                total = rows[producer.name]
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
        dense = self.dense_names
        for name in monitor.steps(dense, "checking other tensors", len(dense)):
            wrong = not_finite(self.tensor(name))
            if wrong:
                yield f"{self.files[name]}: {name}: {wrong}"

    def _problems_of_rotations(self, shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
        """Rotations that do not fit the linears: `shapes` [out, in] by name, of those that are sound."""
        for name, rotations in self.rotations.items():
            fold = self.schema.fold_of(name)
            assert fold is not None  # as `checked_rotations` has seen
            (producer,), (kv, d, _) = fold.producers_of(name), rotations.shape
            if name in shapes and producer.name in shapes:
                if shapes[name][1] != d * (fold.num_heads or 0):
                    heads = f"{fold.num_heads} heads with {shapes[name][1]} channels in all"
                    yield f"{name}: its rotations are for heads of {d} channels, but it reads {heads}"
                elif wrong := _row_problem(name, producer, shapes[producer.name][0], kv * d):
                    yield wrong


def _row_problem(consumer: str, producer: Producer, rows: int, size: int) -> str | None:
    """What is wrong with the rows of a producer that a fold reorders, `size` of `rows`."""
    start, end = producer.rows or (0, rows)
    places = permutation.places(rows, start, end, producer.blocks)
    if isinstance(places, str):
        of_each = f" of each of {producer.blocks} blocks" if producer.blocks > 1 else ""
        return f"{consumer}: its fold names rows {start} to {end}{of_each} of {producer.name}, which has {rows}"
    if len(places) != size:
        return f"{consumer}: its fold reorders {size} rows, but {producer.name} gives it {len(places)}"
    return None


def without_errors(report: dict[str, Any]) -> dict[str, Any]:
    """ria_report.json without the errors of the linears' outputs, which training their weights has changed."""
    linears = report.get("linears")
    if not isinstance(linears, dict):
        return report
    stale = ("error_before", "error_after", "rounding_error")
    kept = {
        name: {key: value for key, value in record.items() if key not in stale} if isinstance(record, dict) else record
        for name, record in linears.items()
    }
    return report | {"linears": kept}

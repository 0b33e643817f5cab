"""Reading a compressed checkpoint, one tensor at a time. Nothing in it is trusted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.consistency import check_digests, check_prefix
from ria_vllm.checkpoint.folding import fold
from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.checkpoint.side_files import checked_proofs, load_permutations
from ria_vllm.checkpoint.sparse_linear import SparseLinear, checked_linear, not_finite
from ria_vllm.checkpoint.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    tensor_names,
    unindexed_files,
    weight_files,
)
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.files.open_files import MOST_BYTES, OpenFiles
from ria_vllm.format import int8_rows, proofs
from ria_vllm.format.proofs import TRANSPOSED
from ria_vllm.format.schema import (
    PERMUTATION_SUFFIX,
    PERMUTATIONS_FILE,
    PROOFS_FILE,
    QUANT_METHOD,
    REPORT_FILE,
    RiaSchema,
)
from ria_vllm.format.stacks import problems_of_experts, stacked_tensors
from ria_vllm.progress import Monitor


def is_compressed(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint that ria-vllm wrote."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    quantization = read_json(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


BLOCK = 1 << 22  # numbers of a large matrix that are read at a time
OF_OTHERS = (
    " It is one of compressed-tensors: `vllm serve` takes it with ria-vllm's plugin, if it is 2:4 in a format that "
    "docs/reference.md lists, but `inspect`, `verify` and `export` do not read it."
)


class Reader:
    """A compressed checkpoint folder. Opening it reads only headers and the permutations.

    Args:
        most_bytes: of what was read that stay mapped.

    Attributes:
        inputs: what tells whether the folder has changed since.

    Raises:
        RiaError: from the constructor and from every method, naming file and layer.
    """

    def __init__(self, folder: str | Path, most_bytes: int = MOST_BYTES):
        self.folder = Path(folder)
        self.inputs = Inputs(self.folder)
        self._open = OpenFiles(most_bytes)
        self.config = read_json(self.folder / "config.json")
        found = self.config.get("quantization_config")
        quantization: dict[str, Any] = found if isinstance(found, dict) else {}
        method = quantization.get("quant_method")
        if method != QUANT_METHOD:
            theirs = OF_OTHERS if method == "compressed-tensors" else ""
            raise RiaError(f"{self.folder}: not a folder that `ria-vllm compress` wrote.{theirs}")
        self.schema = RiaSchema.parse(quantization, str(self.folder / "config.json"))
        self.files = weight_files(self.folder)
        self._check_strays()
        self.sparse_names = [n.removesuffix(".compressed") for n in self.files if n.endswith(".compressed")]
        self.int8_names = [n.removesuffix(".integers") for n in self.files if n.endswith(".integers")]
        for name in self.int8_names:
            if self.schema.weights is None or f"{name}.weight" in self.files or name in self.sparse_names:
                raise RiaError(
                    f"{self.folder}: {name} is stored in int8, which config.json does not say of this model's weights, "
                    "or in another way besides. Get all files of one run."
                )
        if lost := sorted(set(self.schema.int8_linears) - set(self.int8_names)):
            raise RiaError(f"{self.folder}: {lost[0]}.integers is missing. Get the weight files again.")
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
        if not self.sparse_names and not self.schema.int8_linears:
            raise RiaError(f"{self.folder}: no pruned linear in it.")
        check_prefix(self.files, self.schema, "model.", self.folder)
        path = self.folder / PERMUTATIONS_FILE
        if self.schema.permutes and not path.is_file():
            raise RiaError(f"{path}: missing, though the model was compressed with permutations. Get the file again.")
        self.permutations = load_permutations(path) if path.is_file() else {}
        for name in sorted(set(self.permutations) - set(self.sparse_names)):
            raise RiaError(f"{path}: a permutation for {name}, which is not a pruned linear of this model.")
        check_digests(self.schema, self.permutations, self.files.values(), self.folder)

    @property
    def permuted_names(self) -> list[str]:
        return list(self.permutations)

    def _check_strays(self) -> None:
        """Refuse files of other weights that would be loaded along with ours, or in their place.

        Without an index, vLLM reads all files; with any in Mistral's format, only those. transformers prefers the
        single file to an index.
        """
        indexed = (self.folder / INDEX_FILE).is_file()
        own = {path.name for path in self.files.values()}
        if mistral := next(self.folder.rglob("consolidated*.safetensors"), None):
            raise RiaError(f"{mistral}: makes vLLM take this model for one in Mistral's own format. Remove it.")
        for name in unindexed_files(self.folder):
            if name not in own and (name == SINGLE_FILE or not indexed):
                raise RiaError(
                    f"{self.folder / name}: does not belong to {INDEX_FILE if indexed else SINGLE_FILE}, but would be "
                    "loaded. Remove it, or get all files of one run."
                )

    @property
    def dense_names(self) -> list[str]:
        """Tensors of what is not pruned (embeddings, norms, biases, linears left dense), as they are stored."""
        own = {f"{name}.{part}" for name in self.sparse_names for part in self.schema.tensor_names}
        return [name for name in self.files if name not in own]

    def tensor(self, name: str) -> torch.Tensor:
        return self._open.tensor(self.files[name], name)

    def int8(self, name: str) -> dict[str, torch.Tensor]:
        """Load and check the tensors of a matrix that is stored in int8, see `ria_vllm.format.int8_rows`."""
        names = {part: f"{name}.{part}" for part in int8_rows.TENSORS if f"{name}.{part}" in self.files}
        parts = {part: self.tensor(tensor) for part, tensor in names.items()}
        if reason := int8_rows.problem(parts):
            raise RiaError(f"{self.files[names[int8_rows.INTEGERS]]}: {name}.{reason}. Get the weight files again.")
        return parts

    def int8_dense(self, name: str) -> torch.Tensor:
        """The same as a matrix [out, in], in the dense model's dtype."""
        assert self.schema.weights is not None
        return int8_rows.decode(self.int8(name), getattr(torch, self.schema.weights.dtype))

    def linear(self, name: str) -> SparseLinear:
        """Load and check one pruned linear."""
        stored = {part: f"{name}.{part}" for part in self.schema.tensor_names}
        parts = {part: self.tensor(key) for part, key in stored.items() if key in self.files}
        where = self.files.get(stored["compressed"], self.folder)
        return checked_linear(name, parts, self.permutations.get(name), self.schema, where)

    def dense_tensors(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Name -> what makes it, for every tensor of the dense model: in the model's own channel order, experts stacked
        as its files have them. In the order of the files.

        Raises:
            RiaError: an expert is missing, or a tensor is there twice.
        """
        sparse, int8 = set(self.sparse_names), set(self.int8_names)
        stacks = stacked_tensors(self.schema, sparse, self.folder)
        in_stack = {name: tensor for tensor, placement in stacks.items() for name in placement.names}
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for name in sorted(self.files, key=lambda name: (self.files[name], name)):
            linear, _, part = name.rpartition(".")
            if linear in int8 and part in int8_rows.TENSORS:
                found[f"{linear}.weight"] = partial(self.int8_dense, linear)
            elif linear not in sparse or part not in self.schema.tensor_names:
                if name in stacks or name.removesuffix(".weight") in sparse:
                    raise RiaError(f"{self.folder}: {name} is stored dense and pruned. Get the weight files again.")
                found[name] = partial(self.tensor, name)
            elif linear in in_stack:
                tensor = in_stack[linear]
                found.setdefault(tensor, partial(stacks[tensor].join, self.dense, f"{self.folder}: "))
            else:
                found[f"{linear}.weight"] = partial(self.dense, linear)
        return found

    def proved(self, schema: RiaSchema) -> Iterator[tuple[str, torch.Tensor]]:
        """(matrix, its proof) of all matrices, one in memory at a time, and of large plain ones only a part.

        Args:
            schema: says which vector they are proved with.
        """
        for name in self.sparse_names:
            yield from self._pruned_proofs(self.linear(name), schema)
        for name in self.int8_names:
            yield from self._int8_proofs(name, schema)
        for name in self.dense_names:
            yield from self._plain_proofs(name, schema)

    def _pruned_proofs(self, linear: SparseLinear, schema: RiaSchema) -> Iterator[tuple[str, torch.Tensor]]:
        """That of the matrix and, where there is one as well, that of the transposed one."""
        weight = (linear if self.schema.weights is None else replace(linear, dtype=torch.float32)).dense()  # exact
        yield linear.name, proofs.proof(weight, schema.proof_vector(weight.shape[1]))
        if schema.proved_transposed(linear.name):
            yield linear.name + TRANSPOSED, proofs.proof(weight.T, schema.proof_vector(len(weight)))

    def _int8_proofs(self, name: str, schema: RiaSchema) -> Iterator[tuple[str, torch.Tensor]]:
        """The same of a matrix in int8, of which only a part is widened at a time."""
        parts = self.int8(name)
        count, columns = parts[int8_rows.INTEGERS].shape
        r, rows = schema.proof_vector(columns), max(1, BLOCK // max(1, columns))
        blocks = ({part: tensor[at : at + rows] for part, tensor in parts.items()} for at in range(0, count, rows))
        found = [proofs.proof(int8_rows.decode(block, torch.float32), r) for block in blocks]
        yield name, torch.cat([torch.empty(0, 2, dtype=torch.float32), *found])

    def _plain_proofs(
        self, name: str, schema: RiaSchema, tensor: torch.Tensor | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same of a plain tensor; of one that is no matrix, none.

        Args:
            tensor: it, if it is in memory already; else only a part of it is at a time.
        """
        module, _, part = name.rpartition(".")
        shape = self._open.shape(self.files[name], name)
        if part != "weight" or not proofs.is_matrix(shape):
            return
        r, rows = schema.proof_vector(shape[-1]), max(1, BLOCK // max(1, shape[-1]))
        parts = (slice(start, start + rows) for start in range(0, shape[0], rows))
        blocks = (self._open.read(self.files[name], name, p) if tensor is None else tensor[p] for p in parts)
        found = [proofs.proof(block.flatten(1), r) for block in blocks]
        yield module, torch.cat([torch.empty(0, 2, dtype=torch.float32), *found])
        if schema.proved_transposed(module):
            weight = self.tensor(name) if tensor is None else tensor
            yield module + TRANSPOSED, proofs.proof(weight.T, schema.proof_vector(len(weight)))

    def proofs(self) -> dict[str, torch.Tensor]:
        """Matrix -> its proof, float32 [out, 2], as stored."""
        path = self.folder / PROOFS_FILE
        return checked_proofs(path if path.is_file() else None, self.schema, self.folder)

    def _disproved(self, proved: Iterable[tuple[str, torch.Tensor]], stored: dict[str, torch.Tensor]) -> Iterator[str]:
        """What is wrong with matrices by their proofs, which are taken from `stored`, in sentences."""
        for matrix, found in proved if self.schema.proofs is not None else ():
            if matrix not in stored:
                yield f"{matrix}: no proof of it in {PROOFS_FILE}"
            elif not proofs.agree(found, stored.pop(matrix)):
                yield f"{matrix}: its weights are not those that the checkpoint was written with ({PROOFS_FILE})"

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
        shapes: dict[str, tuple[int, int]] = {}
        permutations: dict[str, torch.Tensor] = {}
        stored = self.proofs()
        for name in monitor.steps(self.sparse_names, "checking pruned linears", len(self.sparse_names)):
            if self.schema.ignored(name):
                yield f"{name}: listed as ignored in config.json, but stored compressed"
            try:
                linear = self.linear(name)
            except RiaError as error:
                yield str(error)
                continue
            shapes[name] = linear.shape
            if linear.input_permutation is not None:
                permutations[name] = linear.input_permutation
            wrong = [
                f"{self.files[f'{name}.{part}']}: {name}: {reason}"
                for part, tensor in linear.parts.items()
                if (reason := not_finite(tensor))
            ]
            yield from wrong or self._disproved(self._pruned_proofs(linear, self.schema), stored)
        yield from problems_of_experts(self.schema, shapes, sparse)
        yield from self._problems_of_folds(permutations, shapes)
        for name in self.int8_names:
            try:
                yield from self._disproved(self._int8_proofs(name, self.schema), stored)
            except RiaError as error:
                yield str(error)
        dense = self.dense_names
        for name in monitor.steps(dense, "checking other tensors", len(dense)):
            tensor = self.tensor(name)
            if reason := not_finite(tensor):
                yield f"{self.files[name]}: {name}: {reason}"
            else:
                yield from self._disproved(self._plain_proofs(name, self.schema, tensor), stored)
        here = sparse | {name.removesuffix(".weight") for name in dense} | set(self.int8_names)
        for name in sorted(stored):
            if name.removesuffix(TRANSPOSED) not in here:
                yield f"{name}: missing, though {PROOFS_FILE} has its proof"

    def _problems_of_folds(
        self, permutations: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]
    ) -> Iterator[str]:
        """What is wrong with the folds of the pruned linears that could be read, in sentences."""
        try:
            folding = fold(self.schema, permutations, set(self.sparse_names).__contains__, self.folder)
        except RiaError as error:
            yield str(error)
            return
        for producer, permuted in folding.row_permutations.items():
            for rows in permuted if producer in shapes else ():
                try:
                    rows.places(shapes[producer][0])
                except ValueError as error:
                    yield f"{self.folder}: {producer}: folds do not fit its rows: {error}"

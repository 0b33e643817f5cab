"""What happens to a tensor of the checkpoint between vLLM's stream of weights and vLLM's own weight loaders."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from ria_vllm.checkpoint.folding import RowPermutation
from ria_vllm.errors import RiaError
from ria_vllm.format.weight_scheme import TensorSpec
from ria_vllm.serve.load.shards import ShardId, ShardMap

Loader = Callable[..., Any]


def check_tensor(name: str, tensor: torch.Tensor, spec: TensorSpec, rows: int, columns: int) -> None:
    """Check that a tensor is what a checkpoint stores for a linear [rows, columns].

    Raises:
        RiaError: its dtype or shape is another.
    """
    shape = () if spec.per_tensor and not tensor.dim() else spec.shape(rows, columns)
    if tensor.dtype not in spec.part.dtypes or tuple(tensor.shape) != shape:
        raise RiaError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but the model needs {spec.dtypes} {shape}. "
            "The file is damaged, or config.json belongs to another model: get both again. Or vLLM's model changes "
            "the tensor on the way, which works for dense weights only: `ria-vllm export` makes a dense folder."
        )


class LayerLoader:
    """Stands before vLLM's weight loaders of one layer: checks each tensor, records it, and permutes its rows.

    Args:
        shards: which linears a shard id covers.
        specs: what the linears' tensors look like, by the last part of their names.
        in_features: of the whole layer.
        row_permutations: for each linear of the layer, those of its rows.

    Attributes:
        rows: shard id -> rows that a tensor must have; replaced if the model brings its own loader.
        loaded: (last part of the name, output of the layer) of every tensor that was loaded.
        scale_dtypes: those of the `weight_scale`s among them.
    """

    def __init__(
        self,
        shards: ShardMap,
        specs: Mapping[str, TensorSpec],
        in_features: int,
        row_permutations: Sequence[Sequence[RowPermutation]],
    ):
        self.shards = shards
        self.specs = specs
        self.in_features = in_features
        self.rows: Mapping[ShardId, int] = shards.rows
        self.row_permutations = dict(zip(shards.linears, row_permutations))
        self.loaded: set[tuple[str, ShardId]] = set()
        self.scale_dtypes: set[torch.dtype] = set()
        self._loading = False

    @property
    def permutes_rows(self) -> bool:
        return any(self.row_permutations.values())

    def wrap(self, part: str, loader: Loader) -> Loader:
        """Wrap one of vLLM's loaders so that it gets tensors called `part` only after `accept`.

        The result is a plain function with the loader's name, because vLLM inspects both.
        """

        @functools.wraps(loader)
        def load(param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None) -> None:
            arguments = () if loaded_shard_id is None else (loaded_shard_id,)
            if self._loading:  # vLLM's loaders cut a tensor and call each other with the pieces
                loader(param, loaded_weight, *arguments)
                return
            loaded_weight = self.accept(part, loaded_weight, loaded_shard_id)
            self._loading = True
            try:
                loader(param, loaded_weight, *arguments)
            finally:
                self._loading = False

        load.__dict__["ria_wrapped"] = loader
        return load

    def accept(self, part: str, tensor: torch.Tensor, shard: ShardId) -> torch.Tensor:
        """Check and record a tensor, and return it with its rows permuted as the layer computes them.

        Raises:
            RiaError: see `check_tensor`; or its rows cannot be permuted.
        """
        if part in self.specs:
            rows = self.rows.get(shard, tensor.shape[0] if tensor.dim() else 0)
            name = f"{'+'.join(self.shards.linears_of(shard))}.{part}"
            check_tensor(name, tensor, self.specs[part], rows, self.in_features)
            self.loaded.update((part, output) for output in self.shards.outputs_of(shard))
            if part == "weight_scale":
                self.scale_dtypes.add(tensor.dtype)
        p = self.row_permutation(part, tensor, shard)
        return tensor if p is None else tensor.index_select(0, p)

    def row_permutation(self, part: str, tensor: torch.Tensor, shard: ShardId) -> torch.Tensor | None:
        """int64 [rows of `tensor`], None to leave them as they are."""
        linears = self.shards.linears_of(shard)
        if not any(self.row_permutations[linear] for linear in linears):
            return None
        name = f"{'+'.join(linears)}.{part}"
        if not tensor.dim():
            raise RiaError(f"{name}: one number, expected one for each row. The checkpoint is damaged; get it again.")
        whole = set(self.shards.outputs_of(shard)) == set(self.shards.outputs)
        if len(linears) > 1 or (len(self.shards.linears) == 1 and not whole):
            raise RiaError(
                f"{name}: vLLM fuses or splits it before its layer loads it, so its rows cannot be permuted. "
                "`ria-vllm export` makes a dense folder."
            )
        rows = torch.arange(tensor.shape[0], device=tensor.device)
        for own in self.row_permutations[linears[0]]:
            try:
                rows = own.take(rows)
            except ValueError as error:
                raise RiaError(f"{name}: its fold does not fit: {error}. The checkpoint is damaged.") from None
        return rows

    def check_complete(self) -> None:
        """Check that all tensors have been loaded.

        Raises:
            RiaError: names the first one that has not.
        """
        for output in self.shards.outputs:
            for part in self.specs:
                if (part, output) not in self.loaded:
                    raise absent(f"{'+'.join(self.shards.linears_of(output))}.{part}")


def absent(tensor: str) -> RiaError:
    return RiaError(f"{tensor} is in none of the weight files. Get them again.")


def unwrapped(loader: Loader) -> Loader:
    """What `LayerLoader.wrap` was given, or `loader` if it was not wrapped."""
    return getattr(loader, "ria_wrapped", loader)


def rows_of_mamba2(loader: Loader) -> int | None:
    """Rows of the tensor that vLLM's loader for Mamba-2 takes; None for any other loader.

    With one group for all heads it copies rows to several ranks, so the layer has more rows than the tensor.
    """
    if not inspect.isroutine(loader):
        return None
    spec = inspect.getclosurevars(loader).nonlocals.get("shard_spec")
    return None if spec is None else sum(size - repeated for size, repeated, _ in spec)

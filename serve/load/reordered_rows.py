"""A tensor with reordered rows, of which no more is copied than vLLM's loaders ask for."""

import torch
from torch.utils._pytree import tree_map_only


class ReorderedRows(torch.Tensor):
    """`tensor[rows]`, copied as late as possible.

    Where `tensor` is mapped from its file, the rows of other ranks are never read. `narrow` returns a plain tensor.
    """

    rows: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, rows: torch.Tensor) -> "ReorderedRows":
        """`tensor[rows]`, or `original[rows]` reordered as `tensor` is, if that is a reordered `original` itself.

        Args:
            tensor: [n, ...].
            rows: int64 [n], a permutation, because shape and strides stay those of the tensor.
        """
        if isinstance(tensor, cls):
            rows = rows[tensor.rows]
        reordered = tensor.as_subclass(cls)
        reordered.rows = rows
        return reordered

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in WITHOUT_COPY:
                return function(*args, **kwargs)
            if function is torch.Tensor.narrow and args[1:2] == (0,) and len(args) == 4:
                reordered, _, start, length = args
                return reordered.as_subclass(torch.Tensor).index_select(0, reordered.rows.narrow(0, start, length))
            args, kwargs = tree_map_only(cls, cls.copy, (args, kwargs))
            return function(*args, **kwargs)

    def copy(self) -> torch.Tensor:
        """All rows, as a plain tensor."""
        return self.as_subclass(torch.Tensor).index_select(0, self.rows)


WITHOUT_COPY = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
}
"""What a `ReorderedRows` has in common with its tensor."""

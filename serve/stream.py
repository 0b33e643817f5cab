"""The checkpoint's tensors on their way into vLLM's model, each with its name in the checkpoint.

vLLM's models rename, fuse and sometimes rearrange what they load, by rules of their own, before a layer's weight loader
sees a tensor. A tensor that still is what the file holds carries its name; one that does not has been changed on the way,
and a compressed tensor bears no change.
"""

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

# Tensors of a stream that are remembered for those who took an alias of one. vLLM takes it at once.
REMEMBERED = 16

_NAME = "ria_checkpoint_name"


class WeightStream:
    """Names the tensors that `model.load_weights` is given.

    Attributes:
        active: a model is loading. What it loads then and nobody has named was changed on the way.
    """

    def __init__(self) -> None:
        self.active = False
        self.recent: deque[tuple[weakref.ref, str]] = deque(maxlen=REMEMBERED)

    def attach(self, model: torch.nn.Module, before_reload: Callable[[], None]) -> None:
        """Stand between vLLM's loaders and `model`, now and on every reload."""
        load, loaded = model.load_weights, False

        @functools.wraps(load)
        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: object, **kwargs: object) -> object:
            nonlocal loaded
            if loaded:
                before_reload()
            loaded = self.active = True
            try:
                return load(self.named(weights), *args, **kwargs)
            finally:
                self.active = False
                self.recent.clear()

        model.load_weights = load_weights

    def named(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            setattr(tensor, _NAME, name)
            self.recent.append((weakref.ref(tensor), name))
            yield name, tensor

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The checkpoint's name of a tensor, or of all that an alias shows of one; None if it is neither."""
        name = getattr(tensor, _NAME, None)
        return name if name is not None else next((n for one, n in self.recent if _is_alias(tensor, one())), None)


def _is_alias(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return (
        other is not None
        and tensor.data_ptr() == other.data_ptr() != 0
        and (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
    )

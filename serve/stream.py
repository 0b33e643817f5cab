"""The checkpoint's tensors on their way into vLLM's model, each with its name in the checkpoint.

vLLM's models rename, fuse and sometimes rearrange what they load, by rules of their own, before a layer's weight loader
sees a tensor. A tensor that still is what the file holds, or a copy of that, has a name here. One without was changed on
the way, and compressed tensors allow no change.
"""

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

# Tensors of a stream that are kept for those who take a copy of one. vLLM takes it at once.
REMEMBERED = 8
# What a linear is stored as; nobody asks for the names of other tensors, which may be large.
KINDS = (".compressed", ".bitmask", ".weight", ".weight_scale", ".bias")

_NAME = "ria_checkpoint_name"


class WeightStream:
    """Names the tensors that `model.load_weights` is given.

    Attributes:
        active: a model is loading. What it loads then and nobody has named was changed on the way.
        strict: whether that is an error; see `ria_vllm.serve.config.ROWS_REARRANGED_BY_VLLM`.
    """

    def __init__(self) -> None:
        self.active = False
        self.strict = True
        self.recent: deque[tuple[torch.Tensor, str]] = deque(maxlen=REMEMBERED)

    def attach(self, model: torch.nn.Module, before_reload: Callable[[bool], None], loaded: bool = False) -> None:
        """Stand between vLLM's loaders and `model`, now and on every reload.

        Args:
            before_reload: raises a RiaError for what must not be loaded into this model; its argument is whether vLLM
                reads it from the model's files.
            loaded: the model has weights already, for they are made up.
        """
        load = model.load_weights

        @functools.wraps(load)
        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: object, **kwargs: object) -> object:
            nonlocal loaded
            if loaded:
                # vLLM's loaders read files as they go. A list comes from a trainer, piece by piece, and from no file.
                self._check(model, functools.partial(before_reload, not isinstance(weights, list | tuple)))
            loaded = self.active = True
            try:
                return load(self.named(weights), *args, **kwargs)
            finally:
                self.active = False
                self.recent.clear()

        model.load_weights = load_weights

    @staticmethod
    def _check(model: torch.nn.Module, before_reload: Callable[[], None]) -> None:
        try:
            before_reload()
        except Exception:
            current = get_current_vllm_config_or_none()
            if current is not None:  # vLLM has emptied the model already: the old weights go back to their places
                finalize_layerwise_reload(model, current.model_config)
            raise

    def named(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            setattr(tensor, _NAME, name)
            if name.endswith(KINDS):
                self.recent.append((tensor, name))
            yield name, tensor

    def name_of(self, tensor: torch.Tensor, wanted: Collection[str] = ()) -> str | None:
        """The checkpoint's name of a tensor, or of what it is a copy of; None if it is neither.

        Args:
            wanted: names to prefer where several tensors are equal.
        """
        if not hasattr(tensor, _NAME):
            names = [name for other, name in reversed(self.recent) if _is_copy(tensor, other)]
            if not names:
                return None
            # A reload asks again, when the others are gone.
            setattr(tensor, _NAME, next((name for name in names if name in wanted), names[0]))
        return getattr(tensor, _NAME)


def _is_copy(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
        return False
    bits = torch.uint8 if tensor.dim() else None  # torch.equal knows no fp8, and no NaN that equals itself
    return torch.equal(tensor.contiguous().view(bits), other.contiguous().view(bits)) if bits else bool(tensor == other)

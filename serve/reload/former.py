"""What a model computes with while other weights replace it: kept until these are served, or put back."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class Former:
    """A model as it was when this was made.

    What vLLM and kernels have packed hangs on attributes of layers and of their methods: these are noted, and what they
    refer to stays where it is. What will be overwritten in its place has to be kept before, in the host's memory.

    Args:
        keeps: whether the model has weights that are worth it.
    """

    def __init__(self, model: torch.nn.Module, keeps: bool = True):
        self.keeps = keeps
        self._containers = [(one, one.copy()) for one in _containers(model)]
        self._data = [(one, one.data) for one in model.parameters()]
        self._bytes: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy what tensors hold, once: others may be views of the same memory."""
        for tensor in tensors if self.keeps else ():
            storage = tensor.untyped_storage()
            place = tensor.device, storage.data_ptr()
            if not tensor.is_meta and storage.nbytes() and place not in self._bytes:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self._bytes[place] = whole, whole.to("cpu", copy=True)

    @torch.no_grad()
    def put_back(self) -> None:
        for container, before in self._containers:
            container.clear()
            container.update(before)
        for tensor, data in self._data:
            tensor.data = data
        for whole, before in self._bytes.values():
            whole.copy_(before)


def _containers(model: torch.nn.Module) -> Iterator[Any]:
    """The attributes of all modules, of what computes them, and of their tensors."""
    for module in model.modules():
        for one in (module, module.__dict__.get("quant_method"), module.__dict__.get("impl")):
            if hasattr(one, "__dict__"):
                yield vars(one)
                yield from (value for value in vars(one).values() if type(value) in (dict, set))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor.__dict__

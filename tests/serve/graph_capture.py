"""The rules of a CUDA graph's capture, for code that runs without a GPU."""

import weakref
from collections.abc import Callable, Mapping

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class GraphCapture(TorchDispatchMode):
    """Refuses what a capture would: shapes or branches that depend on a value, and tensors on another device.

    A graph's memory comes from a pool that the graph owns, so nothing that is allocated during the capture may be kept
    for later calls: see `kept`.

    Args:
        device: the type of the device that plays the GPU.
        bodies: Python functions of our own operators, which the mode looks into; all others are single steps to it.
    """

    def __init__(self, device: str, bodies: Mapping[torch._ops.OpOverload, Callable]):
        super().__init__()
        self._device, self._bodies = device, bodies
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self._bodies:
            with self:
                return self._bodies[function](*args, **kwargs)
        synchronises = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))
        if function.overloadpacket in _INDEXING:  # with masks, unlike indices, the result's size depends on values
            synchronises = bool({t.dtype for t in tree_leaves(args[1]) if t is not None} & {torch.bool, torch.uint8})
        assert not synchronises, f"{function}: the host waits for a value"
        self._check_devices(function, {torch.device(kwargs.get("device") or self._device).type})
        self._check_devices(function, {t.device.type for t in _tensors_in((args, kwargs))})
        result = function(*args, **kwargs)
        self._check_devices(function, {t.device.type for t in _tensors_in(result)})
        self._made += map(weakref.ref, _tensors_in(result))
        return result

    def _check_devices(self, function: torch._ops.OpOverload, devices: set[str]) -> None:
        assert devices <= {self._device}, f"{function}: on {devices}"

    def kept(self, *returned: torch.Tensor) -> list[torch.Tensor]:
        """Tensors made during the capture that are still alive and share no memory with those `returned`."""
        alive = [t for t in (reference() for reference in self._made) if t is not None]
        memory = {_memory_of(t) for t in returned}
        return [t for t in alive if _memory_of(t) not in memory]


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # meta tensors have no addresses


def _tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

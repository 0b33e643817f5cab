"""One parameter with pruned linears: its mask, a bit for each element, and what is zero outside it."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ria_vllm.errors import RiaError
from ria_vllm.training.gathering import own_share

_EARLIER = (
    "Call keep_sparse before anything changes the weights (a merged adapter does), with the folder that the model was "
    "loaded from."
)
PIECE = 1 << 22
"""Elements that are masked or checked at once."""


class KeptWeight:
    """One parameter with pruned linears, and which of its elements are kept.

    Args:
        mask: bool, of the parameter's whole shape.
    """

    def __init__(self, name: str, module: nn.Module, leaf: str, mask: torch.Tensor):
        self.name, self.module, self.leaf = name, module, leaf
        self.shape = mask.shape
        self.packed = _packed(mask)
        self.local: tuple[Any, torch.Tensor] | None = None  # how the weight was sharded, and its part of the mask

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"local": None}  # a device mesh belongs to its process

    def parameter(self) -> torch.Tensor:
        """The parameter that is in the place of the weight by now.

        Raises:
            RiaError: it has another shape.
        """
        found = self.module._parameters.get(self.leaf)
        if found is None or found.shape != self.shape:
            shape = "gone" if found is None else f"of shape {tuple(found.shape)} now, not {tuple(self.shape)}"
            raise RiaError(
                f"{self.name}: its weight is {shape}, so it cannot be kept sparse. Trainers that flatten weights or "
                "cut them up do so (FSDP1, DeepSpeed ZeRO-3); use FSDP2 (`fsdp_version: 2` in accelerate's settings)."
            )
        return found

    def zero_outside(self, tensor: torch.Tensor) -> None:
        """Zero a tensor like the weight, or sharded as it is, outside the mask, in place."""
        _zero_dropped(*self._local(tensor))

    def check_zeros(self, folder: Path, advice: str = _EARLIER) -> None:
        """Check that the weight is zero outside the mask, as far as this process holds it.

        Raises:
            RiaError: it is not.
        """
        weight = self.parameter().detach()
        if not weight.is_meta and not _has_zeros(*self._local(weight)):
            raise RiaError(f"{self.name}: not zero everywhere outside the mask in {folder}. {advice}")

    def mask_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.zero_outside(parameter.grad)

    def hook(self, parameter: torch.Tensor) -> None:
        """Have the gradient of `parameter` masked whenever it has been accumulated."""
        hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if parameter.requires_grad and parameter.is_leaf and self.mask_gradient not in hooks.values():
            parameter.register_post_accumulate_grad_hook(self.mask_gradient)

    def _local(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What this process holds of a tensor like the weight, and the packed mask of that."""
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            return local, self._packed_locally(tensor, local)
        return tensor, self._on(tensor.device)

    def _on(self, device: torch.device) -> torch.Tensor:
        if self.packed.device != device and device.type != "meta":
            self.packed = self.packed.to(device)
        return self.packed.to(device)

    def _packed_locally(self, tensor: DTensor, local: torch.Tensor) -> torch.Tensor:
        sharding = (tensor.device_mesh, tensor.placements, local.device)
        if self.local is None or self.local[0] != sharding:
            part = own_share(_dropped(self.packed.cpu(), self.shape).logical_not_(), tensor)
            if part.shape != local.shape:
                raise RiaError(
                    f"{self.name}: sharded in a way that torch cannot shard its mask by: {tensor.placements}."
                )
            self.packed = self.packed.cpu()
            self.local = (sharding, _packed(part.to(local.device)))
        return self.local[1]


def _packed(mask: torch.Tensor) -> torch.Tensor:
    """uint8 [ceil(n/8)] from bool of n elements."""
    flat = mask.reshape(-1)
    flat = nn.functional.pad(flat, (0, -len(flat) % 8))
    bits = flat.view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.sum(-1, dtype=torch.uint8)


def _dropped(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """bool of this shape, True where the mask that was `_packed` is False."""
    # Eight bits become the eight bytes of an integer in one lookup.
    return _eight_bytes(packed.device)[packed.int()].view(torch.bool)[: shape.numel()].view(shape)


def _zero_dropped(tensor: torch.Tensor, packed: torch.Tensor) -> None:
    """Zero `tensor` where the mask that was `_packed` is False, in pieces, each of which needs few bytes beside it."""
    for piece, dropped in _pieces(tensor, packed):
        piece.masked_fill_(dropped, 0)


def _has_zeros(tensor: torch.Tensor, packed: torch.Tensor) -> bool:
    """Whether `tensor` is zero where the mask that was `_packed` is False."""
    return not any(bool((dropped & (piece != 0)).any()) for piece, dropped in _pieces(tensor, packed))


def _pieces(tensor: torch.Tensor, packed: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of a tensor's parts, and for each a bool of its shape, True where the mask that was `_packed` is False."""
    if not tensor.numel():  # a rank's share of a small weight
        return
    rows = tensor.view(-1) if tensor.is_contiguous() else tensor
    width = rows[0].numel()
    step = 8 * max(1, PIECE // (8 * width))  # a piece of the mask begins with a whole byte
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        bits = packed[start * width // 8 :][: -(-piece.numel() // 8)]
        yield piece, _dropped(bits, piece.shape)


@functools.cache
def _eight_bytes(device: torch.device) -> torch.Tensor:
    """For each byte the integer whose bytes are 1 where its bits, the least significant first, are 0."""
    table = [int.from_bytes(bytes(1 - (byte >> i & 1) for i in range(8)), sys.byteorder) for byte in range(256)]
    return torch.tensor(table, device=device)

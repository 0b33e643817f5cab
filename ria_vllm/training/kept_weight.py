"""One parameter with pruned linears: its mask, and what is zero outside it."""

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


class KeptWeight:
    """One parameter with pruned linears, and which of its elements are kept.

    Args:
        mask: bool, of the parameter's whole shape.
    """

    def __init__(self, name: str, module: nn.Module, leaf: str, mask: torch.Tensor):
        self.name, self.module, self.leaf = name, module, leaf
        self.shape = mask.shape
        self.dropped = ~mask
        self.local: tuple[Any, torch.Tensor] | None = None  # how the weight was sharded, and its part of `dropped`

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
        local, dropped = self._local(tensor)
        local.masked_fill_(dropped, 0)

    def check_zeros(self, folder: Path, advice: str = _EARLIER) -> None:
        """Check that the weight is zero outside the mask, as far as this process holds it.

        Raises:
            RiaError: it is not.
        """
        weight = self.parameter().detach()
        if weight.is_meta:
            return
        local, dropped = self._local(weight)
        if bool((dropped & (local != 0)).any()):
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
        """What this process holds of a tensor like the weight, and a bool of its shape: what is outside the mask."""
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            return local, self._dropped_locally(tensor, local)
        return tensor, self._on(tensor.device)

    def _on(self, device: torch.device) -> torch.Tensor:
        if self.dropped.device != device and device.type != "meta":
            self.dropped = self.dropped.to(device)
        return self.dropped.to(device)

    def _dropped_locally(self, tensor: DTensor, local: torch.Tensor) -> torch.Tensor:
        sharding = (tensor.device_mesh, tensor.placements, local.device)
        if self.local is None or self.local[0] != sharding:
            part = own_share(self.dropped.cpu(), tensor)
            if part.shape != local.shape:
                raise RiaError(
                    f"{self.name}: sharded in a way that torch cannot shard its mask by: {tensor.placements}."
                )
            self.dropped = self.dropped.cpu()
            self.local = (sharding, part.to(local.device))
        return self.local[1]

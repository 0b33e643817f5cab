"""Which kernel was chosen for a layer, and how it serves it."""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat, name_of
from ria_vllm.serve.kernels.base import ExpertsKernel, ExpertsLayerConfig, LinearKernel, LinearLayerConfig
from ria_vllm.switches import is_on

KERNEL_VARIABLE = "RIA_VLLM_BACKEND"
"""Names the kernel that must serve every linear, and every layer's experts if it is a kernel for experts, too."""

DENSE_VARIABLE = "RIA_VLLM_DENSE"
"""1: every pruned linear is decompressed to a dense one, on any device."""

Kernel = TypeVar("Kernel", LinearKernel, ExpertsKernel)
Config = TypeVar("Config", LinearLayerConfig, ExpertsLayerConfig)


@dataclass(frozen=True)
class Choice(Generic[Kernel, Config]):
    """The kernel for a layer, and the layer as this kernel serves it.

    Attributes:
        widened_from: the format of the layer's weights, if the kernel gets them as floating point.
        unrounded: the `input_dtype` of the layer, if the kernel does not round the inputs.
    """

    kernel: type[Kernel]
    config: Config
    widened_from: WeightFormat | None = None
    unrounded: torch.dtype | None = None

    @property
    def how(self) -> str:
        """In what way the kernel serves the layer; empty if the weights stay as they are and nobody rounds inputs."""
        notes = []
        if self.widened_from is not None:
            notes.append(f"{self.widened_from.name} widened to {name_of(self.config.act_dtype)}")
        if self.config.input_dtype is not None:
            notes.append(f"inputs rounded to {name_of(self.config.input_dtype)}")
        if self.unrounded is not None:
            notes.append(f"inputs not rounded to {name_of(self.unrounded)}")
        return f" with {' and '.join(notes)}" if notes else ""

    def __str__(self) -> str:
        return self.kernel.name + self.how


def widened(config: Config) -> Config:
    """The same layer with its weights as floating point, whose inputs are not rounded."""
    return replace(config, weight_format=FLOAT, input_dtype=None)


def serves_dense() -> bool:
    """Whether RIA_VLLM_DENSE=1 asks for pruned linears decompressed to dense ones.

    Raises:
        RiaError: it has a value that means nothing.
    """
    return is_on(DENSE_VARIABLE, False, "set it to 1 to serve dense linears, or leave it unset.")


def refuse_on_gpus(pattern: Pattern, where: str) -> None:
    """Refuse to serve a folder on GPUs if they cannot multiply its pattern, unless RIA_VLLM_DENSE=1 asks for it.

    Raises:
        RiaError: the folder `where` has such a pattern.
    """
    if pattern != TWO_OF_FOUR and not serves_dense():
        raise RiaError(
            f"{where} is pruned to {pattern}, which only CPUs serve: sparse tensor cores multiply {TWO_OF_FOUR}. "
            "Serve it with vLLM's build for CPUs, compress the model for GPUs (`ria-vllm compress --pattern "
            f"{TWO_OF_FOUR}`), or serve it decompressed to dense weights ({DENSE_VARIABLE}=1)."
        )

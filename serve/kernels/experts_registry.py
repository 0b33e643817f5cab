"""Which kernel serves the routed experts of a layer."""

import os
from dataclasses import dataclass, replace

from ria_vllm.formats import FLOAT, WeightFormat, name_of
from ria_vllm.serve.kernels.base import ExpertsKernel, ExpertsLayerConfig
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel
from ria_vllm.serve.kernels.registry import KERNEL_VARIABLE

EXPERTS_KERNELS: tuple[type[ExpertsKernel], ...] = (CpuExpertsKernel,)
"""Our kernels, in order of preference."""


@dataclass(frozen=True)
class ExpertsChoice:
    """The kernel for a layer's experts, and the layer as it serves them: perhaps with their weights widened."""

    kernel: type[ExpertsKernel]
    config: ExpertsLayerConfig
    widened_from: WeightFormat | None = None

    def __str__(self) -> str:
        name = f"{self.kernel.name} experts"
        if self.widened_from is None:
            return name
        return f"{name} with {self.widened_from.name} widened to {name_of(self.config.act_dtype)}"


def choose_experts(config: ExpertsLayerConfig) -> ExpertsChoice | None:
    """The first kernel that serves the experts as they are stored, or else widened to the activations' dtype.

    If RIA_VLLM_BACKEND is set, only the kernel of that name. None: no kernel does.
    """
    forced = os.environ.get(KERNEL_VARIABLE)
    attempts: list[tuple[ExpertsLayerConfig, WeightFormat | None]] = [(config, None)]
    if config.weight_format != FLOAT:
        attempts.append((replace(config, weight_format=FLOAT), config.weight_format))
    for attempt, widened_from in attempts:
        for kernel in EXPERTS_KERNELS:
            if forced and kernel.name != forced:
                continue
            if kernel.is_supported(config.device) is None and kernel.can_implement(attempt) is None:
                return ExpertsChoice(kernel, attempt, widened_from)
    return None

"""How a kernel is chosen, for linears and for experts alike."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat, name_of
from ria_vllm.serve.kernels.base import ExpertsKernel, ExpertsLayerConfig, LinearKernel, LinearLayerConfig

KERNEL_VARIABLE = "RIA_VLLM_BACKEND"
"""Names the kernel that must serve every linear, and every layer's experts if it is a kernel for experts, too."""

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


def reason_against_pattern(
    kernel: type[LinearKernel] | type[ExpertsKernel], config: LinearLayerConfig | ExpertsLayerConfig
) -> str | None:
    """Why the kernel cannot serve the layer's pattern, or None. One that was written for 2:4 alone must not be asked:
    it would read positions that are not there."""
    patterns = getattr(kernel, "patterns", (TWO_OF_FOUR,))
    if config.pattern in patterns:
        return None
    return f"no {config.pattern} weights; {', '.join(map(str, patterns))} only"


def refuse_on_gpus(pattern: Pattern, where: str) -> None:
    """Refuse to serve a folder on GPUs if they cannot multiply its pattern: any other way would be slow.

    Raises:
        RiaError: the folder `where` has such a pattern.
    """
    if pattern != TWO_OF_FOUR:
        raise RiaError(
            f"{where} is pruned to {pattern}, which only CPUs serve: sparse tensor cores multiply {TWO_OF_FOUR}. "
            "Serve it with vLLM's build for CPUs, compress the model for GPUs (`ria-vllm compress --pattern "
            f"{TWO_OF_FOUR}`), or serve the dense folder that `ria-vllm export` writes."
        )


def choose(
    config: Config,
    kernels: Sequence[type[Kernel]],
    reason_against: Callable[[type[Kernel], Config], str | None],
    others: Collection[str] = (),
) -> Choice[Kernel, Config]:
    """The first kernel that serves a layer as it is; else the first that serves it without rounding its inputs, which
    is more exact; else the first that serves its weights widened to the activations' dtype; else a fallback, in the
    same three ways. RIA_VLLM_BACKEND forces a kernel instead.

    Args:
        kernels: in order of preference.
        others: names of kernels for other kinds of layers, which RIA_VLLM_BACKEND does not force here.

    Raises:
        RiaError: RIA_VLLM_BACKEND names no kernel, or one that cannot serve the layer; or none can.
    """
    forced = os.environ.get(KERNEL_VARIABLE)
    if forced and (forced not in others or forced in {kernel.name for kernel in kernels}):
        return _forced(config, forced, kernels, reason_against)
    fast = [kernel for kernel in kernels if not kernel.is_fallback]
    fallbacks = [kernel for kernel in kernels if kernel.is_fallback]
    choice = _first(fast, config, reason_against) or _first(fallbacks, config, reason_against)
    if choice is None:
        reasons = "; ".join(f"{kernel.name}: {reason_against(kernel, config)}" for kernel in kernels)
        raise RiaError(f"no kernel can serve {config}: {reasons}")
    return choice


def _first(
    candidates: Sequence[type[Kernel]],
    config: Config,
    reason_against: Callable[[type[Kernel], Config], str | None],
) -> Choice[Kernel, Config] | None:
    attempts = [config]
    if config.input_dtype is not None:
        attempts.append(replace(config, input_dtype=None))
    if config.weight_format != FLOAT:
        attempts.append(widened(config))
    for attempt in attempts:
        for kernel in candidates:
            if reason_against(kernel, attempt) is None:
                return Choice(
                    kernel,
                    attempt,
                    widened_from=config.weight_format if attempt.weight_format != config.weight_format else None,
                    unrounded=config.input_dtype if attempt.input_dtype is None else None,
                )
    return None


def _forced(
    config: Config,
    name: str,
    kernels: Sequence[type[Kernel]],
    reason_against: Callable[[type[Kernel], Config], str | None],
) -> Choice[Kernel, Config]:
    named = {kernel.name: kernel for kernel in kernels}
    if name not in named:
        raise RiaError(f"{KERNEL_VARIABLE}={name} is not a kernel for {config}; choose from {', '.join(named)}.")
    choice = _first([named[name]], config, reason_against)
    if choice is None:
        # It cannot serve the widened weights either, and that reason is what matters.
        reason = reason_against(named[name], widened(config))
        raise RiaError(f"{KERNEL_VARIABLE}={name} cannot serve {config}: {reason}")
    return choice

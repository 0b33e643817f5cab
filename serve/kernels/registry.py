"""Which kernel serves a linear, and which the experts of a layer."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.kernels import int8_inputs
from ria_vllm.serve.kernels.base import ExpertsKernel, ExpertsLayerConfig, LinearKernel, LinearLayerConfig
from ria_vllm.serve.kernels.choice import KERNEL_VARIABLE, Choice, Config, Kernel, serves_dense, widened
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, check_forced_instruction_set
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.cuda.experts import CutlassExpertsKernel
from ria_vllm.serve.kernels.dense import DenseKernel
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel
from ria_vllm.serve.kernels.torch.cusparselt import CusparseltKernel

if TYPE_CHECKING:  # it needs pydantic, which a machine that measures GPUs need not have
    from ria_vllm.format.weight_scheme import Weights

# Both in order of preference.
LINEAR_KERNELS: tuple[type[LinearKernel], ...] = (CutlassKernel, CusparseltKernel, CpuKernel, ReferenceKernel)

EXPERTS_KERNELS: tuple[type[ExpertsKernel], ...] = (
    CpuExpertsKernel,
    CutlassExpertsKernel,
    ReferenceExpertsKernel,
)

# Sides of the square weight in `self_test`, which uses the first that the kernel takes.
_SELF_TEST_SIDES = (64, 128, 256)

LinearChoice = Choice[LinearKernel, LinearLayerConfig]
ExpertsChoice = Choice[ExpertsKernel, ExpertsLayerConfig]


def explain(config: LinearLayerConfig | ExpertsLayerConfig) -> list[tuple[str, str | None]]:
    """Each kernel's name, in order of preference, with the reason why it cannot serve the layer as it is, or None."""
    return [(kernel.name, reason_against(kernel, config)) for kernel in _candidates(config)]


def _candidates(config: LinearLayerConfig | ExpertsLayerConfig) -> Sequence[Any]:
    if isinstance(config, ExpertsLayerConfig):
        return EXPERTS_KERNELS
    return (DenseKernel,) if serves_dense() else LINEAR_KERNELS


def reason_against(kernel: Any, config: LinearLayerConfig | ExpertsLayerConfig) -> str | None:
    """Why the kernel cannot serve the layer, or None."""
    if (reason := kernel.is_supported(config.device)) is not None:
        return reason
    # One that was written for 2:4 alone must not be asked: it would read positions that are not there.
    patterns = getattr(kernel, "patterns", (TWO_OF_FOUR,))
    if config.pattern not in patterns:
        return f"no {config.pattern} weights; {', '.join(map(str, patterns))} only"
    reason = kernel.can_implement(config)
    tested = getattr(kernel, "linears", None) if isinstance(config, ExpertsLayerConfig) else kernel
    if reason is not None or tested is None:
        return reason
    return self_test(tested, config.device, config.act_dtype, config.weight_format, config.input_dtype, config.pattern)


@lru_cache
def self_test(
    kernel: type[LinearKernel],
    device: torch.device,
    act_dtype: torch.dtype,
    weight_format: WeightFormat,
    input_dtype: torch.dtype | None = None,
    pattern: Pattern = TWO_OF_FOUR,
) -> str | None:
    """What goes wrong when the kernel multiplies something small in this format on this device, or None.

    It finds a driver that is too old, or a library without code for this GPU, while another kernel can still take the
    layer. A kernel that takes no small layer is not tested.
    """
    for side in _SELF_TEST_SIDES:
        config = LinearLayerConfig(device, act_dtype, weight_format, side, side, input_dtype, pattern)
        if side % weight_format.column_multiple == 0 and kernel.can_implement(config) is None:
            break
    else:
        return None
    try:
        # Random values and positions: mixed-up rows, columns or metadata are wrong by far more than rounding.
        # On the CPU and in float32, whatever defaults vLLM has set while it builds or loads a model.
        generator = torch.Generator("cpu").manual_seed(0)
        options = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        weight = torch.randn(side, side, **options).to(device)
        mask = sparse24.mask_from_bitmask(sparse24.compress(weight, None, pattern)[1])
        weight, scales = weight_format.quantize((weight * mask).to(act_dtype), act_dtype)
        parts = weight_format.encode(weight, mask, scales, pattern)
        x = torch.randn(8, side, **options).to(device, act_dtype)
        y = kernel.apply(config, x, kernel.pack(config, parts), None, None)
        expected, tolerance = int8_inputs.product(x, weight_format, parts, None, input_dtype is not None), 0.1
        if input_dtype is not None:
            # Kernels differ by float32 roundings. One that does not round its inputs is off by about 0.005.
            expected, tolerance = expected.to(act_dtype).float(), 0.001
        right = y.shape == expected.shape and bool((y.float() - expected).norm() <= tolerance * expected.norm())
    except Exception as error:  # of torch, of a library, of a driver
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"a small product fails on this device: {reason}"
    return None if right else "a small product comes out wrong on this device"


@overload
def choose(config: LinearLayerConfig) -> LinearChoice: ...
@overload
def choose(config: ExpertsLayerConfig) -> ExpertsChoice: ...
def choose(config: Any) -> Any:
    """The first kernel that serves a layer as it is; else the first that serves it without rounding its inputs, which
    is more exact; else the first that serves its weights widened to the activations' dtype; else a fallback, in the
    same three ways. RIA_VLLM_BACKEND forces a kernel instead; one for linears leaves that of experts free where it
    does not serve them. RIA_VLLM_DENSE=1 leaves linears no kernel but the dense one.

    Raises:
        RiaError: RIA_VLLM_BACKEND names no kernel, or one that cannot serve the layer; or none can. Or the layer is on
            a CPU, and RIA_VLLM_CPU_ISA names an instruction set that it does not have.
    """
    if config.device.type == "cpu":
        check_forced_instruction_set()
    candidates, forced = _candidates(config), os.environ.get(KERNEL_VARIABLE)
    named = {kernel.name: kernel for kernel in candidates}
    choice = _forced(config, forced, named) if forced else None
    if choice is not None:
        return choice
    fast = [kernel for kernel in candidates if not kernel.is_fallback]
    fallbacks = [kernel for kernel in candidates if kernel.is_fallback]
    choice = _first(fast, config) or _first(fallbacks, config)
    if choice is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(config))
        raise RiaError(f"no kernel can serve {config}: {reasons}")
    return choice


def _first(candidates: Sequence[type[Kernel]], config: Config) -> Choice[Kernel, Config] | None:
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


def _forced(config: Any, name: str, named: dict[str, Any]) -> Any:
    """The choice of this kernel; None if it is one for linears, and leaves these experts free."""
    for_linears = isinstance(config, ExpertsLayerConfig) and name in [kernel.name for kernel in LINEAR_KERNELS]
    if name not in named and for_linears:
        return None
    if name not in named:
        raise RiaError(f"{KERNEL_VARIABLE}={name} is not a kernel for {config}; choose from {', '.join(named)}.")
    choice = _first([named[name]], config)
    if choice is None and not (for_linears and named[name].is_fallback):
        # It cannot serve the widened weights either, and that reason is what matters.
        reason = reason_against(named[name], widened(config))
        raise RiaError(f"{KERNEL_VARIABLE}={name} cannot serve {config}: {reason}")
    return choice


def choose_and_pack(
    weights: "Weights", dtype: torch.dtype, input_dtype: torch.dtype | None = None
) -> tuple[LinearChoice, tuple[torch.Tensor, ...]]:
    """The kernel for these weights under activations of `dtype`, and the weights as it packs them."""
    config = LinearLayerConfig(
        weights.device,
        dtype,
        weights.format,
        weights.out_features,
        weights.in_features,
        input_dtype,
        weights.pattern,
    )
    choice = choose(config)
    if choice.widened_from is not None:
        weights = weights.widened(dtype)
    elif weights.widened_from is not None:
        choice = replace(choice, widened_from=weights.widened_from)
    return choice, choice.kernel.pack(choice.config, weights.parts)

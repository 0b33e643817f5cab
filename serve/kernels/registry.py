"""Which kernel serves a layer: the kernels of other packages first, then ours, in order of preference."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

import torch

from ria_vllm import sparse24
from ria_vllm.errors import RiaError
from ria_vllm.formats import FLOAT, WeightFormat, name_of
from ria_vllm.serve.kernels.base import LinearKernel, LinearLayerConfig
from ria_vllm.serve.kernels.cpu.backend import CpuKernel
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.kernels.torch.cusparselt import CusparseltKernel

ENTRY_POINT_GROUP = "ria_vllm.linear_kernels"
"""The group under which other packages register their kernels, each a `LinearKernel` class."""

OWN_KERNELS: tuple[type[LinearKernel], ...] = (CutlassKernel, CusparseltKernel, CpuKernel, ReferenceKernel)

KERNEL_VARIABLE = "RIA_VLLM_BACKEND"
"""Names the kernel that must serve every layer."""

# Sides of the square weight in `self_test`, which uses the first that the kernel takes.
_SELF_TEST_SIDES = (64, 128, 256)


@dataclass(frozen=True)
class Choice:
    """The kernel for a layer, and the layer as this kernel serves it: perhaps with its weights widened."""

    kernel: type[LinearKernel]
    config: LinearLayerConfig
    widened_from: WeightFormat | None = None

    def __str__(self) -> str:
        if self.widened_from is None:
            return self.kernel.name
        return f"{self.kernel.name} with {self.widened_from.name} widened to {name_of(self.config.act_dtype)}"


@lru_cache
def kernels() -> tuple[type[LinearKernel], ...]:
    """All kernels, in order of preference.

    Raises:
        RiaError: another package's kernel that cannot be loaded, is not a kernel, or has the name of another one.
    """
    found: dict[str, type[LinearKernel]] = {kernel.name: kernel for kernel in OWN_KERNELS}
    others = []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)):
        kernel = _load(entry)
        if kernel.name in found:
            raise RiaError(
                f"{_describe(entry)}: another kernel is named {kernel.name!r} already. Update or uninstall that "
                "package."
            )
        found[kernel.name] = kernel
        others.append(kernel)
    return (*others, *OWN_KERNELS)


def _describe(entry: EntryPoint) -> str:
    package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
    return f"entry point {entry.name} = {entry.value} ({ENTRY_POINT_GROUP}){package}"


def _load(entry: EntryPoint) -> type[LinearKernel]:
    try:
        kernel = entry.load()
    except Exception as error:
        raise RiaError(
            f"{_describe(entry)} cannot be loaded ({type(error).__name__}: {error}). Repair or uninstall that package."
        ) from error
    asked = ("name", "is_fallback", "is_supported", "can_implement", "pack", "apply")
    # A subclass of the protocol inherits methods that answer None, which means yes.
    absent = [name for name in asked if getattr(kernel, name, None) is getattr(LinearKernel, name, None)]
    if absent:
        raise RiaError(
            f"{_describe(entry)} is not a LinearKernel: it has no {absent[0]}. Update or uninstall that package."
        )
    return kernel


def explain(config: LinearLayerConfig) -> list[tuple[str, str | None]]:
    """Each kernel's name, in order of preference, with the reason why it cannot serve the layer as it is, or None."""
    return [(kernel.name, reason_against(kernel, config)) for kernel in kernels()]


def reason_against(kernel: type[LinearKernel], config: LinearLayerConfig) -> str | None:
    """Why the kernel cannot serve the layer, or None."""
    reason = kernel.is_supported(config.device)
    reason = kernel.can_implement(config) if reason is None else reason
    if reason is None:
        reason = self_test(kernel, config.device, config.act_dtype, config.weight_format)
    return reason


@lru_cache
def self_test(
    kernel: type[LinearKernel], device: torch.device, act_dtype: torch.dtype, weight_format: WeightFormat
) -> str | None:
    """What goes wrong when the kernel multiplies something small in this format on this device, or None.

    It finds a driver that is too old, or a library without code for this GPU, while another kernel can still take the
    layer. A kernel that takes no small layer is not tested.
    """
    for side in _SELF_TEST_SIDES:
        config = LinearLayerConfig(device, act_dtype, weight_format, side, side)
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
        mask = sparse24.mask_from_bitmask(sparse24.compress(weight)[1])
        weight, scales = weight_format.quantize((weight * mask).to(act_dtype), act_dtype)
        parts = weight_format.encode(weight, mask, scales)
        x = torch.randn(8, side, **options).to(device, act_dtype)
        y = kernel.apply(config, x, kernel.pack(config, parts), None, None)
        expected = x.float() @ weight_format.decode(parts, torch.float32).T
        right = y.shape == expected.shape and bool((y.float() - expected).norm() <= 0.1 * expected.norm())
    except Exception as error:  # another package's kernel may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"a small product fails on this device: {reason}"
    return None if right else "a small product comes out wrong on this device"


def widened(config: LinearLayerConfig) -> LinearLayerConfig:
    """The same layer with its weights as floating point."""
    return replace(config, weight_format=FLOAT)


def choose(config: LinearLayerConfig) -> Choice:
    """The kernel for a layer: the first that serves its weights as they are; else the first that serves them widened to
    the activations' dtype; else a fallback. RIA_VLLM_BACKEND forces a kernel instead.

    Raises:
        RiaError: RIA_VLLM_BACKEND names no kernel, or one that cannot serve the layer; or none can.
    """
    forced = os.environ.get(KERNEL_VARIABLE)
    if forced:
        return _forced(config, forced)
    fast = [kernel for kernel in kernels() if not kernel.is_fallback]
    fallbacks = [kernel for kernel in kernels() if kernel.is_fallback]
    choice = _first(fast, config) or _first(fallbacks, config)
    if choice is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(config))
        raise RiaError(f"no kernel can serve {config}: {reasons}")
    return choice


def _first(candidates: Sequence[type[LinearKernel]], config: LinearLayerConfig) -> Choice | None:
    attempts: list[tuple[LinearLayerConfig, WeightFormat | None]] = [(config, None)]
    if config.weight_format != FLOAT:
        attempts.append((widened(config), config.weight_format))
    for attempt, widened_from in attempts:
        for kernel in candidates:
            if reason_against(kernel, attempt) is None:
                return Choice(kernel, attempt, widened_from)
    return None


def _forced(config: LinearLayerConfig, name: str) -> Choice:
    named = {kernel.name: kernel for kernel in kernels()}
    if name not in named:
        raise RiaError(f"{KERNEL_VARIABLE}={name} is not a kernel; choose from {', '.join(named)}.")
    choice = _first([named[name]], config)
    if choice is None:
        # It cannot serve the widened weights either, and that reason is what matters.
        reason = reason_against(named[name], widened(config))
        raise RiaError(f"{KERNEL_VARIABLE}={name} cannot serve {config}: {reason}")
    return choice

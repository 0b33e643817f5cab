"""Which kernel serves a layer's experts. They are all ours, in order of preference."""

from functools import lru_cache

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.kernels import choice, int8_inputs, registry
from ria_vllm.serve.kernels.base import Activation, ExpertsKernel, ExpertsLayerConfig
from ria_vllm.serve.kernels.cpu.backend import check_forced_instruction_set
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel, activate

KERNELS: tuple[type[ExpertsKernel], ...] = (CpuExpertsKernel, ReferenceExpertsKernel)

Choice = choice.Choice[ExpertsKernel, ExpertsLayerConfig]

# Channels of a token in `self_test`, channels between an expert's products, and experts. Groups of every format fit.
_HIDDEN, _INTERMEDIATE, _EXPERTS = 256, 128, 3


def choose(config: ExpertsLayerConfig) -> Choice:
    """The kernel for the experts of a layer, as `ria_vllm.serve.kernels.choice.choose` chooses it.

    RIA_VLLM_BACKEND forces it only if it names a kernel for experts: one for linears leaves the choice free.

    Raises:
        RiaError: RIA_VLLM_BACKEND names no kernel at all, or one for experts that cannot serve these; or none can. Or
            they are on a CPU, and RIA_VLLM_CPU_ISA names an instruction set that it does not have.
    """
    if config.device.type == "cpu":
        check_forced_instruction_set()
    return choice.choose(config, KERNELS, reason_against, [kernel.name for kernel in registry.kernels()])


def explain(config: ExpertsLayerConfig) -> list[tuple[str, str | None]]:
    """Each kernel's name, in order of preference, with the reason why it cannot serve the layer as it is, or None."""
    return [(kernel.name, reason_against(kernel, config)) for kernel in KERNELS]


def reason_against(kernel: type[ExpertsKernel], config: ExpertsLayerConfig) -> str | None:
    """Why the kernel cannot serve the layer, or None."""
    reason = kernel.is_supported(config.device) or choice.reason_against_pattern(kernel, config)
    reason = kernel.can_implement(config) if reason is None else reason
    if reason is None:
        reason = self_test(
            kernel,
            config.device,
            config.act_dtype,
            config.weight_format,
            config.activation,
            config.input_dtype,
            config.pattern,
        )
    return reason


@lru_cache
def self_test(
    kernel: type[ExpertsKernel],
    device: torch.device,
    act_dtype: torch.dtype,
    weight_format: WeightFormat,
    activation: Activation,
    input_dtype: torch.dtype | None = None,
    pattern: Pattern = TWO_OF_FOUR,
) -> str | None:
    """What goes wrong when the kernel computes a few small experts in this format on this device, or None.

    They have biases, a permuted input, and some experts on other ranks.
    """
    config = ExpertsLayerConfig(
        device,
        act_dtype,
        weight_format,
        _EXPERTS,
        _HIDDEN,
        _INTERMEDIATE,
        activation,
        has_bias=True,
        input_dtype=input_dtype,
        pattern=pattern,
    )
    try:
        # On the CPU and in float32, whatever defaults vLLM has set while it builds or loads a model.
        generator = torch.Generator("cpu").manual_seed(0)
        options = {"generator": generator, "device": "cpu", "dtype": torch.float32}

        def random_weight(rows: int, columns: int) -> dict[str, torch.Tensor]:
            experts = []
            for _ in range(_EXPERTS):
                weight = torch.randn(rows, columns, **options).to(device) / columns**0.5
                mask = sparse24.mask_from_bitmask(sparse24.compress(weight, None, pattern)[1])
                quantized = _quantized(weight * mask, weight_format, act_dtype, mask)
                experts.append(weight_format.encode(*quantized, pattern))
            return {name: torch.stack([parts[name] for parts in experts]) for name in experts[0]}

        gate_up = random_weight(config.gate_up_rows, _HIDDEN)
        down = random_weight(_HIDDEN, _INTERMEDIATE)
        sizes = (config.gate_up_rows, _HIDDEN)
        size_of_biases = 1 if input_dtype is None else 0.1  # small beside what the rounding of inputs changes
        biases = [(torch.randn(_EXPERTS, size, **options) * size_of_biases).to(device, act_dtype) for size in sizes]
        x = torch.randn(8, _HIDDEN, **options).to(device, act_dtype)
        permutation = torch.randperm(_HIDDEN, generator=generator, device="cpu").to(device, torch.int32)
        # Twice as many experts as this rank has, which here come in another order.
        expert_map = torch.tensor([-1, 2, 0, -1, 1, -1], dtype=torch.int32, device=device)
        ids = torch.tensor([[2, 1], [4, 2], [1, -1], [2, 3]] * 2, dtype=torch.int32, device=device)
        weights = torch.rand(8, 2, **options).to(device)
        packed = kernel.pack(config, gate_up, down, *biases)
        y = kernel.apply(config, x, weights, ids, packed, permutation, expert_map)

        def product(given: torch.Tensor, which: int, expert: int) -> torch.Tensor:
            bias, parts = biases[which][expert], {name: part[expert] for name, part in (gate_up, down)[which].items()}
            return int8_inputs.product(given, weight_format, parts, bias, input_dtype is not None)

        expected = torch.zeros(8, _HIDDEN, device=device)
        for number, expert in enumerate(expert_map.tolist()):
            if expert < 0:
                continue
            share = (weights * (ids == number)).sum(1, keepdim=True)
            inner = activate(activation, product(x[:, permutation.long()], 0, expert)).to(act_dtype)
            expected += share * product(inner, 1, expert)
        # Kernels differ in the last bits of the activation. One that does not round its inputs is off by 0.008 or more.
        expected, tolerance = expected.to(act_dtype).float(), 0.1 if input_dtype is None else 0.003
        right = y.shape == expected.shape and bool((y.float() - expected).norm() <= tolerance * expected.norm())
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"a few small experts fail on this device: {reason}"
    return None if right else "a few small experts come out wrong on this device"


def _quantized(
    weight: torch.Tensor, weight_format: WeightFormat, dtype: torch.dtype, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weight, scales = weight_format.quantize(weight.to(dtype), dtype)
    return weight, mask, scales

"""What was loaded, for one line in the log and for the key of vLLM's compile cache."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ria_vllm.format.formats import FP8
from ria_vllm.format.weight_format import WeightFormat, name_of
from ria_vllm.serve.kernels.choice import DENSE_VARIABLE, KERNEL_VARIABLE, Choice
from ria_vllm.serve.kernels.dense import DenseKernel
from ria_vllm.serve.load.completeness import is_in_int8

# vLLM configures the handlers of its own loggers only.
logger = init_logger("vllm.ria")


def _on_first_rank(text: str, *values: Any) -> None:
    """Say once, on the first rank, what holds on all of them."""
    if get_tensor_model_parallel_rank() == 0:
        logger.warning_once(text, *values)


def say_widened(name: str, dtype: torch.dtype, why: str) -> None:
    """Say that a matrix in int8 is served in the dtype of the activations."""
    if get_tensor_model_parallel_rank() == 0:
        logger.info("%s is stored in int8 and served in %s, because %s.", name, name_of(dtype), why)


def warn_of_all_gather() -> None:
    _on_first_rank(
        "A permutation that no fold absorbs crosses tensor-parallel ranks. Its layers all-gather their input, "
        "which is correct but slow. A smaller --tensor-parallel-size, or compressing with folds, avoids it."
    )


def warn_of_choice(choice: Choice[Any, Any], activations: torch.dtype | None) -> None:
    """Say once for each way of serving a layer what it costs, or what it does not do, if that is unexpected.

    Args:
        activations: to which the checkpoint wants the inputs rounded; None for no rounding.
    """
    if choice.kernel is DenseKernel:
        _on_first_rank(
            "%s=1: pruned linears are decompressed, so they take the memory and the time of dense ones.",
            DENSE_VARIABLE,
        )  # fmt: skip
        return
    config = choice.config
    stored = choice.widened_from or config.weight_format
    name = choice.kernel.name
    forced = os.environ.get(KERNEL_VARIABLE) == name
    if choice.kernel.is_fallback and not forced:
        _on_first_rank(
            "The kernel %s serves %s, because no fast one does: the answers are right, but slow. `ria-vllm doctor` "
            "says why.", name, config,
        )  # fmt: skip
    if choice.widened_from is not None:
        _on_first_rank(
            "Weights in %s are widened to %s, because no kernel for %s multiplies them as the checkpoint "
            "wants: the answers are right, but the weights take the memory of %s.",
            choice.widened_from.name, name_of(config.act_dtype), config.device.type, name_of(config.act_dtype),
        )  # fmt: skip
    rounded = torch.float8_e4m3fn if config.weight_format == FP8 else config.input_dtype
    if rounded != activations and get_tensor_model_parallel_rank() == 0:
        warn_of_inputs(activations, f"no fast kernel for {config.device.type} does it with these weights", stored)


def warn_of_inputs(activations: torch.dtype | None, reason: str, stored: WeightFormat) -> None:
    """Say once that inputs are not rounded to `activations`, if that is a dtype, and why.

    To be called on every rank if the reason may hold on one of them alone, as that its weights are not 2:4.

    Args:
        stored: the format of the weights in the checkpoint.
    """
    if activations is not None:
        logger.warning_once(
            "Inputs are not rounded to %s, because %s: the answers are those of weights in %s alone.",
            name_of(activations), reason, stored.name,
        )  # fmt: skip


@dataclass
class LoadReport:
    """Sums over the layers of one model in one process, once all are packed.

    Attributes:
        kernels: kernel, and how it serves its layers -> number of pruned layers.
        dense: kernel -> number of layers that are dense in int8.
        folded: permutations that other linears absorb.
        gathered: permutations that linears apply to their inputs themselves.
        dense_bytes: what the weights would take dense, in the dtype that is served.
        packed_bytes: what they take.
        graph: all that shapes the traced graph.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)
    folded: int = 0
    gathered: int = 0
    dense_bytes: int = 0
    packed_bytes: int = 0
    graph: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: torch.nn.Module) -> "LoadReport":
        report = cls()
        for path, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if method is not None and hasattr(method, "report"):  # the layer has stored weights
                method.report(layer, report)
            elif method is not None and is_in_int8(layer):
                report.graph.append(f"{path} int8")
        return report

    def add(self, kernel: str, folded: int, gathered: int, dense_bytes: int, packed_bytes: int, graph: str) -> None:
        """Count a pruned layer. `graph` is everything about it that shapes the traced graph."""
        self.kernels[kernel] += 1
        self.folded += folded
        self.gathered += gathered
        self.dense_bytes += dense_bytes
        self.packed_bytes += packed_bytes
        self.graph.append(graph)

    def leave_out(self, prefix: str, claims_24: bool, stored: WeightFormat, kernel: str | None = None) -> None:
        """Leave out a layer that is not 2:4 on this rank, perhaps on no other.

        Args:
            claims_24: config.json says that it is.
            stored: the format of its weights in the checkpoint.
            kernel: multiplies these weights as they are stored; None: they are widened.
        """
        if kernel is not None:
            self.dense[kernel] += 1
        elif claims_24:
            logger.warning(
                "%s: config.json says 2:4, but some groups of four have more than two non-zeros: served dense", prefix
            )
        elif stored.quantization is not None:
            logger.warning_once(
                "Weights in %s that are not 2:4, and that config.json does not call so, are dequantized and served "
                "dense: the answers are right, but the weights take the memory of a dense model.", stored.name,
            )  # fmt: skip
        self.graph.append(f"{prefix} dense {kernel}")

    def finish(self) -> None:
        """Say what was loaded, and add a digest to vLLM's compile key, which knows neither the kernels nor their
        layouts.

        The key is a digest of vLLM's configuration. A draft model may share that with its target, so each model adds a
        digest of its own, whatever the order of loading.
        """
        if not self.graph:
            return
        current = get_current_vllm_config_or_none()
        if current is not None and isinstance(current.additional_config, dict):
            digest = hashlib.sha256(repr(self.graph).encode()).hexdigest()
            current.additional_config["ria_vllm"] = sorted([*current.additional_config.get("ria_vllm", []), digest])
        if get_tensor_model_parallel_rank() == 0:
            self.log()

    def log(self) -> None:
        kernels = ", ".join(f"{name} ({count})" for name, count in self.kernels.most_common())
        for name, count in self.dense.items():
            logger.info("%d dense layers in int8, by %s", count, name)
        logger.info(
            "%d pruned layers, kernels: %s; permutations: %d folded, %d gathered; %.1f MB of weights, %.1f MB saved",
            self.kernels.total(), kernels, self.folded, self.gathered,
            self.packed_bytes / 1e6, (self.dense_bytes - self.packed_bytes) / 1e6,
        )  # fmt: skip

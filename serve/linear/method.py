"""Sparse24LinearMethod: one of vLLM's linear layers with pruned weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from ria_vllm.checkpoint.folding import RowPermutation
from ria_vllm.errors import RiaError
from ria_vllm.format.int8_rows import INTEGERS, SCALE
from ria_vllm.format.weight_scheme import Weights, WeightScheme, misfit, uneven_cut
from ria_vllm.serve.linear.dense_int8 import DenseInt8, dense_int8
from ria_vllm.serve.linear.packing import pack_linear
from ria_vllm.serve.linear.parameters import (
    Creation,
    create_parameters,
    set_parameter,
    take_parameters,
    use_loader_of_model,
)
from ria_vllm.serve.load.load_report import LoadReport, warn_of_all_gather, warn_of_choice, warn_of_inputs
from ria_vllm.serve.load.loading import LayerLoader, Loader, unwrapped
from ria_vllm.serve.load.shards import ShardMap


@dataclass(frozen=True)
class StoredLinear:
    """One of the checkpoint's linears that a layer is made of.

    Attributes:
        name: in the checkpoint.
        scheme: how its weight is stored.
        permutation: int32 [in], that of its input channels; None: they are not permuted.
        folded: other linears compute the input permuted already.
        row_permutations: of its own rows, for the linears that read its output.
        claims_24: config.json says that it is 2:4.
    """

    name: str
    scheme: WeightScheme
    permutation: np.ndarray | None = None
    folded: bool = False
    row_permutations: tuple[RowPermutation, ...] = ()
    claims_24: bool = True

    @property
    def input_permutation(self) -> np.ndarray | None:
        """The permutation that the linear applies to its input itself."""
        return None if self.folded else self.permutation


@register_weight_loader_v2_supported_method
class ProvisionalDenseMethod(UnquantizedLinearMethod):
    """The method of a layer whose prefix names no pruned linear, until its path is known."""

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        self.creation = Creation.record(super().create_weights, layer, *args, **kwargs)


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """Loads linears in stored form and serves them through ria::sparse24_linear.

    Args:
        prefix: vLLM's name of the layer, for errors.
        linears: what the layer is made of, in output order.

    Attributes:
        row_loader: loads what a linear has for each of its rows, [out, any].
    """

    def __init__(self, prefix: str, linears: tuple[StoredLinear, ...]):
        self.prefix = prefix
        self.linears = linears
        self.names = tuple(linear.name for linear in linears)
        self.dense: UnquantizedLinearMethod | DenseInt8 | None = None

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        self.creation = Creation.record(self._create_weights, layer, *args, **kwargs)

    def _create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.scheme = self.linears[0].scheme
        ranks = input_size // input_size_per_partition
        if reason := misfit(self.scheme, input_size) or uneven_cut(self.scheme, input_size, ranks):
            raise RiaError(f"{self.prefix}: {reason}")
        if any(linear.scheme != self.scheme for linear in self.linears):
            raise RiaError(
                f"{self.prefix}: vLLM fuses {', '.join(self.names)}, but they are not stored alike. Compress the model "
                "again with all of them in --ignore, or none."
            )
        first = self.linears[0].input_permutation
        if not all(np.array_equal(linear.input_permutation, first) for linear in self.linears):
            raise RiaError(
                f"{self.prefix}: vLLM fuses {', '.join(self.names)}, whose permutations differ. Compress the "
                "model again; `ria-vllm export` makes a dense folder of this one."
            )
        self.output_sizes, self.columns = tuple(output_partition_sizes), input_size_per_partition
        self.dtype = params_dtype
        shards = ShardMap.of(layer, self.names, len(output_partition_sizes))
        rows = [linear.row_permutations for linear in self.linears]
        self.layer_loader = LayerLoader(shards, self.scheme.tensors(params_dtype), input_size, rows)
        vllm_loader = extra_weight_attrs["weight_loader"]
        create_parameters(layer, self.layer_loader, output_partition_sizes, input_size_per_partition, vllm_loader)

    def finish_creation(self, layer: LinearBase, model_loader: Loader | None) -> None:
        """Finish a layer whose model is complete, before anything is loaded.

        Args:
            model_loader: the loader that the model gave the layer's weight in place of vLLM's; None if it gave none.
        """
        vllm_loader = self.creation.kwargs["weight_loader"]
        use_loader_of_model(layer, self.layer_loader, vllm_loader, model_loader)
        self.row_loader = self.layer_loader.wrap("proof", model_loader or vllm_loader)
        # If another method created the layer, the bias still has vLLM's own loader.
        if layer.bias is not None and self.layer_loader.permutes_rows:
            layer.bias.weight_loader = self.layer_loader.wrap("bias", unwrapped(layer.bias.weight_loader))

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check what was loaded, pack it for a kernel, and free it."""
        loaded = take_parameters(layer, self.layer_loader.specs)
        if not loaded:
            return
        self._check_permutations(layer)
        self.layer_loader.check_complete()
        weights = self._weights(loaded)
        packed = None
        if weights is None:
            self._serve_dense(layer, loaded)
        else:
            p = self.linears[0].input_permutation
            try:
                packed = pack_linear(layer, weights, p, self.dtype, self.scheme.input_dtype)
            except RuntimeError as error:
                raise RiaError(f"{self.prefix}: {error}") from error
        layer.ria_packed = packed

    def _check_permutations(self, layer: LinearBase) -> None:
        for linear in self.linears:
            p = linear.permutation
            if p is not None and len(p) != layer.input_size:
                raise RiaError(
                    f"{linear.name}: its permutation has {len(p)} channels, its input {layer.input_size}. Get the "
                    "files again."
                )

    def _weights(self, loaded: dict[str, torch.Tensor]) -> Weights | None:
        """What a kernel packs; None if the layer is not 2:4.

        Raises:
            RiaError: damaged scales or a damaged bitmask.
        """
        try:
            return self.scheme.weights(loaded, self.output_sizes, self.dtype, self.layer_loader.scale_dtypes)
        except ValueError as error:
            raise RiaError(f"{' + '.join(self.names)}: {error}. The weight file is damaged; get it again.") from None

    def _serve_dense(self, layer: LinearBase, loaded: dict[str, torch.Tensor]) -> None:
        """Serve in int8, or with vLLM's own method."""
        if self.scheme.plain == INTEGERS:
            rounds = self.scheme.activations == torch.int8
            self.dense = dense_int8(layer, loaded[INTEGERS], loaded[SCALE], self.dtype, rounds)
            if self.dense is not None:
                return
        set_parameter(layer, "weight", self.scheme.dense_weight(loaded, self.output_sizes, self.dtype))
        dense = self.dense = UnquantizedLinearMethod()
        dense.process_weights_after_loading(layer)

    def report(self, layer: LinearBase, report: LoadReport) -> None:
        """Say how the layer is served, and count it."""
        packed = layer.ria_packed
        if packed is None:
            kernel = getattr(self.dense, "kernel_name", None)  # of int8
            report.leave_out(self.prefix, self.linears[0].claims_24, self.scheme.format, kernel)
            if kernel is not None:
                return
            reason = f"{self.prefix} and others like it are not 2:4 and served dense"
            warn_of_inputs(self.scheme.activations, reason, self.scheme.format)
            return
        warn_of_choice(packed.choice, self.scheme.activations)
        kernel = str(packed.choice)
        gathered = sum(linear.input_permutation is not None for linear in self.linears)
        permuted = sum(linear.permutation is not None for linear in self.linears)
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in layer.named_parameters(recurse=False)]
        dense_bytes = sum(self.output_sizes) * self.columns * self.dtype.itemsize
        if packed.input_channels is not None:
            warn_of_all_gather()
        report.add(
            kernel, permuted - gathered, gathered, dense_bytes, packed.packed_bytes(layer),
            f"{self.prefix} {kernel} {shapes}",
        )  # fmt: skip

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out], both of this rank."""
        if layer.ria_packed is None:
            assert self.dense is not None
            return self.dense.apply(layer, x, bias)
        return layer.ria_packed.apply(layer, x, bias)


def stored_linears(model: torch.nn.Module) -> set[str]:
    """The checkpoint's linears that layers of ours in `model` load."""
    return {
        name
        for layer in model.modules()
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, Sparse24LinearMethod)
        for name in layer.quant_method.names
    }

"""Sparse24LinearMethod: one of vLLM's linear layers with 2:4 weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import Parameter
from torch.nn.functional import pad
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from ria_vllm import sparse24
from ria_vllm.errors import RiaError
from ria_vllm.formats import FLOAT, FP8, INT8
from ria_vllm.serve.kernels.base import LinearKernel, LinearLayerConfig
from ria_vllm.serve.kernels.registry import choose
from ria_vllm.serve.loading import BITMASK_OF_ONES_AND_TWOS, Arrivals, create_parameters, take_parameters, unwrapped
from ria_vllm.serve.weight_scheme import is_two_of_four, row_scales

if TYPE_CHECKING:
    from ria_vllm.serve.config import RiaConfig


@dataclass(frozen=True)
class Created:
    """How a layer's parameters were created, so that others can take their place before anything is loaded."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[str, ...]

    @classmethod
    def by(cls, create: Callable[..., None], layer: LinearBase, *args: Any, **kwargs: Any) -> "Created":
        before = set(layer._parameters)
        create(layer, *args, **kwargs)
        return cls(args, kwargs, tuple(name for name in layer._parameters if name not in before))

    def remove(self, layer: LinearBase) -> Callable[..., Any] | None:
        """Take the parameters away again.

        Returns:
            The loader that the layer's model gave its weight in place of vLLM's ordinary one, if it did.
        """
        if "weight" in self.parameters:
            loader = unwrapped(layer.weight.weight_loader)
            loader = None if loader == self.kwargs["weight_loader"] else loader
        else:
            loader = layer.ria_arrivals.loader_of_model()
        for name in self.parameters:
            delattr(layer, name)
        for name in ("weight", "weight_loader"):
            layer.__dict__.pop(name, None)
        if layer.bias is not None:
            layer.bias.weight_loader = unwrapped(layer.bias.weight_loader)
        return loader


@dataclass(frozen=True)
class Product:
    """One call of a kernel: rows [start, start + config.out_features) of the layer. Tensors are named, not held, because
    vLLM swaps a layer's parameters when it reloads weights."""

    kernel: type[LinearKernel]
    config: LinearLayerConfig
    packed: tuple[str, ...]
    input_permutation: str | None
    start: int


@dataclass(frozen=True)
class Plan:
    """How a layer is computed. `channels`: the input is all-gathered over the ranks, then taken at these indices.
    `padding`: zero channels appended to the input."""

    products: tuple[Product, ...]
    channels: str | None
    padding: int


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """Loads the checkpoint's linears `parts` in stored form, serves them through ria::sparse24_linear."""

    def __init__(self, config: "RiaConfig", prefix: str, parts: tuple[str, ...]):
        self.config = config
        self.prefix = prefix
        self.parts = parts
        self.dense: UnquantizedLinearMethod | None = None

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        self.created = Created.by(self._create_weights, layer, *args, **kwargs)
        self.config.report.expected += 1

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
        if input_size_per_partition % 8:
            raise RiaError(
                f"{self.prefix}: {input_size} input channels over {input_size // input_size_per_partition} ranks leave "
                f"{input_size_per_partition} each, no multiple of 8. Use a smaller --tensor-parallel-size."
            )
        storage = self.config.storage(self.parts[0])
        if any(self.config.storage(part) != storage for part in self.parts):
            raise RiaError(f"{self.prefix}: vLLM fuses {', '.join(self.parts)}, but they are not quantized alike.")
        row_orders = tuple(self.config.row_orders(part) for part in self.parts)
        layer.ria_arrivals = Arrivals(
            layer, self.parts, row_orders, len(output_partition_sizes), storage, params_dtype, self.config.stream
        )
        layer.ria_output_sizes = tuple(output_partition_sizes)
        loader = extra_weight_attrs["weight_loader"]
        create_parameters(layer, layer.ria_arrivals, output_partition_sizes, input_size_per_partition, loader)

    def adopt(self, layer: LinearBase, loader: Callable[..., Any] | None) -> None:
        """Take over a layer that had its bias, and the loader that its model gave it, before it had this method."""
        arrivals: Arrivals = layer.ria_arrivals
        if loader is not None:
            arrivals.of_model.weight_loader = loader
        if layer.bias is not None and arrivals.reorders():
            layer.bias.weight_loader = arrivals.wrap("bias", layer.bias.weight_loader)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check what came, repack it for the kernel, and free it."""
        loaded = take_parameters(layer)
        if not loaded:
            return
        for part in self.parts:
            p = self.config.permutations.get(part)
            if p is not None and len(p) != layer.input_size:
                raise RiaError(
                    f"{part}: its permutation has {len(p)} channels, its input {layer.input_size}. Get the files again."
                )
        compressed, bitmask, scales = self._final(layer, loaded)
        layer.ria_arrivals.came.clear()  # a reload begins anew
        first = not hasattr(layer, "ria_plan")
        if not first and (layer.ria_plan is None) != (bitmask is None):
            raise RiaError(
                f"{self.prefix}: its new weights are {'not 2:4' if bitmask is None else '2:4'}, unlike those which "
                "this server started with. Start the server again instead of reloading."
            )
        if bitmask is None:
            if first:
                self.config.report.leave_out(self.prefix, self.parts[0] in self.config.foreign.pruned)
            self._serve_dense(layer, compressed)
            return
        served: torch.dtype = layer.ria_arrivals.served
        rows, columns = compressed.shape[0], compressed.shape[1] * 2
        padding = -columns % sparse24.IN_FEATURES_MULTIPLE
        if padding:
            compressed = pad(compressed, (0, padding // 2))
            bitmask = pad(bitmask, (0, padding // 8), value=BITMASK_OF_ONES_AND_TWOS)
        wrong = sparse24.check_bitmask(bitmask)
        if wrong:
            raise RiaError(f"{' + '.join(self.parts)}: {wrong}. The weight file is damaged; get it again.")

        weights = {"compressed": compressed, "bitmask": bitmask}
        weight_format = FLOAT if scales is None else INT8 if compressed.dtype == torch.int8 else FP8
        if scales is not None:
            weights["weight_scale"] = scales[:, None]
        products, channels, packed_bytes, backends = [], None, 0, []
        for start, size, order in self._groups(layer):
            order, crosses = local_order(order, layer, columns)
            if crosses:
                self.config.report.warn_of_all_gather()
                channels = "input_channels"
                set_tensor(layer, channels, torch.from_numpy(order).to(compressed.device))
                order = None
            rows_of_call = weight_format.take_rows(weights, slice(start, start + size))
            config = LinearLayerConfig(compressed.device, served, weight_format, size, columns + padding)
            choice = choose(config)
            if choice.widened_from is not None:
                rows_of_call = weight_format.widen(rows_of_call, served)
            packed = choice.kernel.pack(choice.config, rows_of_call)
            names = [f"weight_packed_{start}_{i}" if start or i else "weight_packed" for i in range(len(packed))]
            for name, tensor in zip(names, packed):
                set_tensor(layer, name, tensor)
            permutation_name = None
            if order is not None:
                permutation_name = f"input_permutation_{start}"
                order = np.concatenate([order, np.arange(columns, columns + padding, dtype=np.int32)])
                set_tensor(layer, permutation_name, torch.from_numpy(order).to(compressed.device))
            products.append(Product(choice.kernel, choice.config, tuple(names), permutation_name, start))
            packed_bytes += sum(tensor.nbytes for tensor in packed)
            backends.append(str(choice))
        layer.ria_plan = Plan(tuple(products), channels, padding)
        if first:
            self._report(layer, rows * columns * served.itemsize, packed_bytes, backends)

    def _final(
        self, layer: LinearBase, loaded: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Values [out, in/2] in the served dtype, bitmask [out, in/8], None; or int8 or fp8 values, bitmask and scales
        [out]; or the plain weight and twice None, where it was stored plain and is not 2:4 after all."""
        arrivals: Arrivals = layer.ria_arrivals
        missing = arrivals.missing(loaded)
        if missing:
            current = get_current_vllm_config_or_none()
            if arrivals.came or current is None or current.load_config.load_format != "dummy":
                raise RiaError(f"{missing} is in none of the weight files. Get them again.")
            if "bitmask" in loaded:
                loaded["bitmask"].fill_(BITMASK_OF_ONES_AND_TWOS)
        values = loaded["weight"] if arrivals.storage.dense else loaded["compressed"]
        scales = row_scales(loaded["weight_scale"], layer.ria_output_sizes) if arrivals.storage.quantized else None
        if scales is not None and not bool(scales.isfinite().all()):
            raise RiaError(f"{' + '.join(self.parts)}: a weight_scale is no number. The file is damaged; get it again.")
        plain = arrivals.storage.dense and not missing and not is_two_of_four(values)
        if scales is not None and (plain or not arrivals.storage.kept):
            values, scales = (values.float() * scales[:, None]).to(arrivals.served), None
        if plain:
            return values, None, None
        bitmask = loaded.get("bitmask")
        if arrivals.storage.dense:
            # Sorting knows no fp8, and bfloat16 holds all its numbers.
            values, bitmask = sparse24.compress(values.bfloat16() if values.dtype == torch.float8_e4m3fn else values)
            values = values if scales is None else values.to(arrivals.storage.quantized)
        return values, bitmask, scales

    def _serve_dense(self, layer: LinearBase, weight: torch.Tensor) -> None:
        """By vLLM's own method, but behind this one, which the weights of a reload, in stored form, have to pass."""
        set_tensor(layer, "weight", weight)
        layer.ria_plan = None
        self.dense = UnquantizedLinearMethod()
        self.dense.process_weights_after_loading(layer)

    def _groups(self, layer: LinearBase) -> list[tuple[int, int, np.ndarray | None]]:
        """(first row, rows, permutation to gather by) of each product: one for all parts, where they agree."""
        orders = [self.config.gathers(part) for part in self.parts]
        sizes = layer.ria_output_sizes
        if all(np.array_equal(order, orders[0]) for order in orders[1:]):
            return [(0, sum(sizes), orders[0])]
        if len(orders) != len(sizes):
            raise RiaError(
                f"{self.prefix}: vLLM splits its {len(sizes)} outputs otherwise than the checkpoint, whose parts "
                f"({', '.join(self.parts)}) have different permutations. Compress with --permute-scope shared."
            )
        starts = np.cumsum([0, *sizes]).tolist()
        return list(zip(starts, sizes, orders))

    def _report(self, layer: LinearBase, dense_bytes: int, packed_bytes: int, backends: list[str]) -> None:
        gathered = sum(self.config.gathers(part) is not None for part in self.parts)
        permuted = sum(part in self.config.permutations for part in self.parts)
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in layer.named_parameters(recurse=False)]
        self.config.report.add(
            backends, permuted - gathered, gathered, dense_bytes, packed_bytes, f"{self.prefix} {backends} {shapes}"
        )

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out], both of this rank."""
        plan = layer.ria_plan
        if plan is None:
            return self.dense.apply(layer, x, bias)
        if plan.channels is not None:
            x = tensor_model_parallel_all_gather(x).index_select(-1, getattr(layer, plan.channels))
        if plan.padding:
            x = pad(x, (0, plan.padding))
        outputs = [
            product.kernel.apply(
                product.config,
                x,
                [getattr(layer, name) for name in product.packed],
                None if product.input_permutation is None else getattr(layer, product.input_permutation),
                None if bias is None else bias[product.start : product.start + product.config.out_features],
            )
            for product in plan.products
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def local_order(order: np.ndarray | None, layer: LinearBase, columns: int) -> tuple[np.ndarray | None, bool]:
    """The part of a permutation of the whole input that concerns the `columns` stored columns of this rank.

    Returns:
        int32 [columns] and whether it counts channels of the whole input: it does where some rank (all must agree, for
        they gather together) has columns whose channels live on another rank; else it counts this rank's own.
    """
    if order is None or columns == len(order):
        return order, False
    shards = order.reshape(-1, columns)
    first = np.arange(len(shards), dtype=order.dtype)[:, None] * columns
    crosses = bool(((shards < first) | (shards >= first + columns)).any())
    mine = shards[layer.tp_rank]
    return (mine if crosses else mine - first[layer.tp_rank]), crosses


def set_tensor(layer: LinearBase, name: str, tensor: torch.Tensor) -> None:
    """A parameter, so that vLLM counts it, moves it and refills it on a reload."""
    layer.register_parameter(name, Parameter(tensor.contiguous(), requires_grad=False))

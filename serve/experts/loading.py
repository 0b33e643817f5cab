"""The checkpoint's tensors of an MoE layer's experts, on their way into vLLM's layer.

vLLM's models load experts in many ways: they rename, split and fuse tensors, and expect them stacked, transposed or
interleaved. None of that is right for compressed tensors. So these do not pass through the model: each of them goes
to the layer that serves it, see `stream.left_to_the_model`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Stacked
from ria_vllm.format.stacks import LayerExperts
from ria_vllm.format.weight_scheme import TensorSpec
from ria_vllm.serve.load.loading import absent, check_tensor

GATE_UP, DOWN = "gate_up_", "down_"
BIAS = "bias"
"""The parameters that experts are loaded into are called gate_up_PART and down_PART, PART being one of the format."""


@dataclass(frozen=True)
class ExpertSizes:
    """The sizes of an MoE layer, and this rank's part of it.

    Attributes:
        local: E, experts of this rank.
        hidden: H, channels of a token.
        intermediate: channels between the products of an expert, over all ranks.
        rank, ranks: tensor-parallel ones of the experts.
    """

    local: int
    hidden: int
    intermediate: int
    rank: int
    ranks: int

    @classmethod
    def of(cls, moe: Any) -> "ExpertSizes":
        """Those of a layer with vLLM's `moe_config`, before it rounds any up."""
        return cls(moe.num_local_experts, moe.hidden_dim_unpadded, moe.intermediate_size, moe.tp_rank, moe.tp_size)

    @property
    def here(self) -> int:
        """I, intermediate channels of this rank."""
        return self.intermediate // self.ranks

    def shape(self, kind: str) -> tuple[int, int]:
        """(out, in) of an expert's linear in the checkpoint."""
        return (self.hidden, self.intermediate) if kind == "down" else (self.intermediate, self.hidden)


class ExpertsLoader:
    """Checks the tensors of a layer's experts and copies the part of this rank.

    Args:
        experts: what the layer serves.
        sizes: of the layer.
        specs: what the tensors of a linear look like, by the last part of their names.
        row_permutations: of each expert, see `stored.ExpertPermutations.rows`.
        has_bias: the experts have biases.

    Attributes:
        loaded: (part, kind, expert) of every tensor that was loaded.
        scale_dtypes: those of the `weight_scale`s among them.
        biases: (kind, expert) -> the whole bias [out] of every one that was loaded, for proofs.
    """

    def __init__(
        self,
        experts: LayerExperts,
        sizes: ExpertSizes,
        specs: Mapping[str, TensorSpec],
        row_permutations: Sequence[np.ndarray | None],
        has_bias: bool,
    ):
        self.experts = experts
        self.sizes = sizes
        self.specs = specs
        self.row_permutations = row_permutations
        self.has_bias = has_bias
        self.loaded: set[tuple[str, str, int]] = set()
        self.biases: dict[tuple[str, int], torch.Tensor] = {}
        self.scale_dtypes: set[torch.dtype] = set()

    @property
    def outputs(self) -> int:
        """Linears side by side in the first product: gate and up, or up alone."""
        return 2 if self.experts.is_gated else 1

    def create_parameters(self, layer: torch.nn.Module, dtype: torch.dtype) -> None:
        """Give `layer` parameters [E, out, ...] for the tensors of its experts, gate before up. `dtype`: of biases."""
        sizes = self.sizes
        shapes = {GATE_UP: (self.outputs * sizes.here, sizes.hidden), DOWN: (sizes.hidden, sizes.here)}
        for prefix, (rows, columns) in shapes.items():
            for part, spec in self.specs.items():
                data = torch.zeros(sizes.local, *spec.part.shape(rows, columns), dtype=spec.dtype)
                self._register(layer, prefix + part, data)
            if self.has_bias:
                self._register(layer, prefix + BIAS, torch.zeros(sizes.local, rows, dtype=dtype))

    def _register(self, layer: torch.nn.Module, name: str, data: torch.Tensor) -> None:
        parameter = Parameter(data, requires_grad=False)
        parameter.weight_loader = self._weight_loader(name)
        layer.register_parameter(name, parameter)

    def _weight_loader(self, parameter: str) -> Callable[..., None]:
        """A plain function, whose signature vLLM inspects."""
        part = parameter.removeprefix(GATE_UP).removeprefix(DOWN)

        def load_expert(
            param: Parameter, loaded_weight: torch.Tensor, kind: str, expert: int, local_expert: int
        ) -> None:
            self.load(param, loaded_weight, part, kind, expert, local_expert)

        return load_expert

    @property
    def parts(self) -> list[str]:
        """How the names of a linear's tensors end."""
        return [*self.specs, *([BIAS] if self.has_bias else [])]

    def parameter_names(self) -> list[str]:
        return [prefix + part for prefix in (GATE_UP, DOWN) for part in self.parts]

    def give(self, layer: torch.nn.Module, part: str, tensor: torch.Tensor, kind: str, expert: int) -> None:
        """Load a whole tensor of the checkpoint into `layer`, if this rank has the expert.

        Raises:
            RiaError: a tensor that the experts do not have, or of the wrong shape or dtype.
        """
        local_expert = layer.expert_map_manager.map_global_to_local(expert)
        if local_expert < 0:
            return
        name = f"{self.experts.linear(kind, expert)}.{part}"
        if part not in self.parts:
            raise RiaError(
                f"{name}: by its config.json, this model has its experts stored as {', '.join(self.parts)}. "
                "Compress it again."
            )
        parameter = layer._parameters[(DOWN if kind == "down" else GATE_UP) + part]
        parameter.weight_loader(parameter, tensor, kind, expert, local_expert)

    def give_biases(self, layer: torch.nn.Module, name: str, tensor: torch.Tensor, stacked: Stacked) -> None:
        """Load biases that are stored as in the dense model, [experts, out of all stacked linears].

        Raises:
            RiaError: their shape is not that of the experts' biases.
        """
        rows = [self.sizes.shape(kind)[0] for kind in stacked.linears]
        if tuple(tensor.shape) != (self.experts.num_experts, sum(rows)):
            raise RiaError(
                f"{name} is {tuple(tensor.shape)}, but the model needs {(self.experts.num_experts, sum(rows))}. The "
                "file is damaged, or config.json belongs to another model; get both again."
            )
        count = len(rows)
        pieces = [tensor[:, i::count] for i in range(count)] if stacked.interleaved else tensor.split(rows, 1)
        for kind, piece in zip(stacked.linears, pieces):
            for expert in range(self.experts.num_experts):
                self.give(layer, BIAS, piece[expert], kind, expert)

    def load(
        self, param: Parameter, tensor: torch.Tensor, part: str, kind: str, expert: int, local_expert: int
    ) -> None:
        """Check a tensor of an expert's linear and copy this rank's part of it into `param` [E, ...]."""
        self._check(tensor, part, kind, expert)
        self.loaded.add((part, kind, expert))
        if part == "weight_scale":
            self.scale_dtypes.add(tensor.dtype)
        if part == BIAS:
            self.biases[kind, expert] = tensor.to("cpu", copy=True)
        sizes = self.sizes
        target = param.data[local_expert]
        if kind == "down":
            channels = self.specs[part].part.channels if part != BIAS else None
            if part == BIAS and sizes.rank:
                tensor = torch.zeros_like(tensor)  # the ranks' outputs are added, the bias must count once
            if channels is not None:
                width = sizes.here // channels
                tensor = tensor.narrow(1, sizes.rank * width, width)
            target.copy_(tensor)
            return
        p = self.row_permutations[expert]
        if p is None:
            tensor = tensor.narrow(0, sizes.rank * sizes.here, sizes.here)
        else:
            here = p[sizes.rank * sizes.here : (sizes.rank + 1) * sizes.here]
            tensor = tensor.index_select(0, torch.from_numpy(here).to(tensor.device))
        first = sizes.here if kind == "up" and self.experts.is_gated else 0
        target.narrow(0, first, sizes.here).copy_(tensor)

    def _check(self, tensor: torch.Tensor, part: str, kind: str, expert: int) -> None:
        (rows, columns), name = self.sizes.shape(kind), f"{self.experts.linear(kind, expert)}.{part}"
        if part != BIAS:
            check_tensor(name, tensor, self.specs[part], rows, columns)
        elif not tensor.is_floating_point() or tuple(tensor.shape) != (rows,):
            raise RiaError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but the model needs floating point {(rows,)}. The "
                "file is damaged, or config.json belongs to another model: get both again."
            )

    def check_complete(self, experts: Iterable[int]) -> None:
        """Check that all tensors of this rank's `experts` have been loaded.

        Raises:
            RiaError: names the first one that has not.
        """
        for expert, kind, part in product(experts, self.experts.patterns, self.parts):
            if (part, kind, expert) not in self.loaded:
                raise absent(f"{self.experts.linear(kind, expert)}.{part}")

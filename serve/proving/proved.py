"""One layer against what it should compute: what its matrices' proofs say (`Proved`), or what it held before vLLM
packed it (`Given`). `ria_vllm.serve.proving.layers` finds the layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.serve.linear.method import Sparse24LinearMethod
from ria_vllm.serve.load.file_proofs import foreign_vector, rows_of

# Rows of an embedding that are looked up at a time.
LOOKED_UP = 4096

Load = Callable[[ChannelQuantScaleParameter, torch.Tensor], None]
Vector = Callable[[int], torch.Tensor]


def watch_packing(layer: torch.nn.Module, before: Callable[[Any], None]) -> None:
    """Have `before` called with a layer when its method is about to pack what was loaded."""
    pack = layer.quant_method.process_weights_after_loading

    def process(layer: torch.nn.Module) -> None:
        before(layer)
        pack(layer)

    layer.quant_method.process_weights_after_loading = process


@dataclass(frozen=True)
class Proved:
    """A layer that can be proved, as it was before anything was loaded.

    Attributes:
        path: in the model.
        loads: (matrix of the checkpoint, puts its proof where the layer's loader puts its rows). A tied head has none.
        rows: of the layer on this rank.
        columns: of the whole input.
        dtype: of its activations.
        looks_up: rows are looked up, instead of multiplied. An embedding in int8 that may be a head is there twice.
    """

    path: str
    layer: torch.nn.Module
    loads: tuple[tuple[str, Load], ...]
    rows: int
    columns: int
    dtype: torch.dtype
    looks_up: bool = False

    def expected(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """float32 [rows, 2], the proof of the layer's rows in the order in which it computes them, NaN for those that
        no matrix has; None without a proof of all its matrices, or if a model loads a dense layer in a way of its own.
        """
        if not self.loads or not all(name in stored for name in self.matrices):
            return None
        data = torch.full((self.rows, 2), torch.nan, dtype=torch.float32)
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=lambda *_: None)
        for name in ("tp_rank", "tp_size"):  # as `update_param_tp_status` sets them
            if hasattr(self.layer, name):
                setattr(parameter, name, getattr(self.layer, name))
        try:
            for name, load in self.loads:
                load(parameter, stored[name])
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if self.is_pruned:
                raise RiaError(
                    f"{', '.join(self.matrices)}: vLLM's layer {self.path} does not load what it should "
                    f"({type(error).__name__}: {error}). `ria-vllm export` makes a dense folder."
                ) from error
            return None
        return parameter.data

    @property
    def matrices(self) -> list[str]:
        return [name for name, _ in self.loads]

    @property
    def is_pruned(self) -> bool:
        return isinstance(self.layer.quant_method, Sparse24LinearMethod)

    def input(self, vector: Vector) -> torch.Tensor:
        """r, float32 [columns of this rank], as the layer before would hand it over."""
        r = vector(self.columns)
        if self.is_pruned and (first := self.layer.quant_method.linears[0]).folded:
            r = r[torch.from_numpy(first.permutation).long()]
        if isinstance(self.layer, RowParallelLinear):
            here = self.layer.input_size_per_partition
            r = r.narrow(0, self.layer.tp_rank * here, here)
        return r

    def products(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, rows] of x float32 [tokens, columns of this rank], over all ranks.

        Args:
            rows: which an embedding looks up; a layer that multiplies has them all.
        """
        layer = self.layer
        if self.looks_up:
            blocks = rows.to(x.device).split(LOOKED_UP)
            found = (layer.quant_method.embedding(layer, block) for block in blocks)
            y = torch.cat([(x.to(block.dtype) @ block.T).float() for block in found], 1)
        else:
            y = layer.quant_method.apply(layer, x.to(self.dtype), None).float()
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            y = tensor_model_parallel_all_reduce(y)
        return y

    @property
    def kernels(self) -> str:
        """How it is computed, for errors; the same for layers that are computed alike."""
        packed = getattr(self.layer, "ria_packed", None)
        if packed is None:
            method = self.layer.quant_method
            dense = getattr(method, "dense", None)
            return getattr(dense, "kernel_name", None) or f"vLLM's {type(dense or method).__name__}"
        return str(packed.choice)

    def problem(self, vector: Vector, expected: torch.Tensor, tokens: int) -> str | None:
        """What is wrong with the layer, in a sentence; None if it computes what is `expected`, float32 [rows, 2].

        Args:
            tokens: so many rows r, -r, r, ... are multiplied.
        """
        device = self._device
        expected = expected.cpu()
        known = (~expected[:, 0].isnan()).nonzero().flatten()
        y = self.products(proofs.tokens_of(self.input(vector), tokens).to(device), known).cpu()
        y = y if self.looks_up else y[:, known]
        # GPUs may be told to multiply float32 with the mantissa of TF32, which is that of float16.
        tf32 = device.type == "cuda" and self.dtype == torch.float32
        fault = proofs.fault(y, expected[known], self.columns, torch.float16 if tf32 else self.dtype)
        matrices = ", ".join(self.matrices) or f"vLLM's layer {self.path}"
        return fault and f"{matrices} ({self.kernels}): {fault}"

    @property
    def _device(self) -> torch.device:
        """Of what the kernel multiplies with; offloading may move other parameters."""
        packed = getattr(self.layer, "ria_packed", None)
        names = [name for name, _ in self.layer.named_parameters()] if packed is None else packed.parameters
        tensors = [getattr(self.layer, name) for name in names]
        return next((tensor.device for tensor in tensors if tensor.numel()), torch.device("cpu"))


@dataclass(frozen=True)
class Absorbed(Proved):
    """What latent attention takes out of kv_b_proj, and multiplies queries and outputs with: each head's keys [P, L],
    and behind them its values [V, L].

    Attributes:
        attention: vLLM's MLAAttention. On CPUs with AMX it packs both, and empties kv_b_proj.
    """

    attention: Any = field(kw_only=True)

    def expected(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        known = self.is_packed or hasattr(self.attention, "W_UK_T")
        return super().expected(stored) if known else None

    @property
    def is_packed(self) -> bool:
        return getattr(self.attention, "is_amx_bmm_enabled", False)

    @property
    def kernels(self) -> str:
        return "absorbed by latent attention"

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.is_packed else self.attention.W_UK_T.device

    def products(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        one = self.attention
        sizes = (one.num_heads, one.qk_nope_head_dim, one.kv_lora_rank)
        heads, keys, width = sizes if self.is_packed else one.W_UK_T.shape
        x, queries = x.to(self.dtype), torch.eye(keys, dtype=self.dtype, device=x.device).expand(heads, keys, keys)
        if self.is_packed:
            from vllm import _custom_ops as ops

            taken = x.new_empty(heads, keys, width)
            ops.bmm_cpu(taken, queries.contiguous(), one.impl._w_uk_packed, True)  # no scale: ours is bfloat16
        else:
            taken = torch.bmm(queries, one.W_UK_T)
        values = x.new_empty(len(x), heads * one.v_head_dim)
        one._v_up_proj(x.repeat(1, heads), values)
        y = torch.einsum("nkl,tl->tnk", taken.float(), x.float())
        return torch.cat([y, values.float().unflatten(1, (heads, -1))], 2).flatten(1)


@dataclass(frozen=True)
class Convolution(Proved):
    """The weight [out, 1, kernel] of a convolution of each channel by itself. Mixers read it where it was loaded.

    Attributes:
        place: where it is loaded. vLLM packs it on some CPUs, and what is packed no product tells.
    """

    place: torch.Tensor | None = None

    def products(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight if self.layer.weight.dim() == 3 else self.place
        assert weight is not None
        return x @ weight.squeeze(1).float().T


@dataclass(frozen=True)
class Given(Proved):
    """A dense layer of this rank against what it held before it was packed.

    vLLM's models rearrange the rows of some linears as they load them, and scale those of some heads, so no proof of
    the checkpoint is of what they then hold. But that it is what they compute can be shown of some rows of it.
    """

    @classmethod
    def watched(cls, path: str, layer: torch.nn.Module) -> "Given":
        """`layer`, of which a proof is made when its method packs it."""
        looks_up = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
        rows, columns = layer.weight.shape
        found = cls(path, layer, (), rows, columns, layer.weight.dtype, looks_up)
        watch_packing(layer, found.see)
        return found

    def see(self, layer: torch.nn.Module) -> None:
        weight = layer.weight.data
        if tuple(weight.shape) == (self.rows, self.columns):  # else vLLM has emptied it
            here = rows_of(self.rows)
            held = torch.full((self.rows, 2), torch.nan, dtype=torch.float32)
            held[here] = proofs.proof(weight[here.to(weight.device)], foreign_vector(self.columns))
            layer.__dict__["ria_given"] = held

    def expected(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        return self.layer.__dict__.get("ria_given")

    def input(self, vector: Vector) -> torch.Tensor:
        return foreign_vector(self.columns)

    def products(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self.looks_up:
            return super().products(x, rows)
        return self.layer.quant_method.apply(self.layer, x.to(self.dtype), None).float()

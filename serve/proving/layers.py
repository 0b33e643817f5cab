"""Whether each layer of a model computes what its checkpoint says, through the very path that serves it.

A checkpoint has a proof of each matrix, see `ria_vllm.format.proofs`: what it makes of a vector r. Once weights are
loaded and packed, each layer of this rank multiplies r with its kernel. Which rows it has, and in what order, is
learned by sending the proofs through the loaders that its weights came through.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.serve.linear.method import Sparse24LinearMethod
from ria_vllm.serve.load.completeness import dense_layers, is_in_int8
from ria_vllm.serve.load.file_proofs import foreign_vector, rows_of
from ria_vllm.serve.load.layerwise import watch_packing
from ria_vllm.serve.load.model_paths import destinations
from ria_vllm.serve.load.shards import ShardId, ShardMap
from ria_vllm.serve.load.stream import Taker
from ria_vllm.serve.model.config import RiaConfig

logger = init_logger("vllm.ria")

LOOKED_UP = 256

Load = Callable[[ChannelQuantScaleParameter, torch.Tensor], None]
Vector = Callable[[int], torch.Tensor]


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
            y = x @ layer.quant_method.embedding(layer, rows.to(x.device)).float().T
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

    def problem(
        self, vector: Vector, expected: torch.Tensor, tokens: int, before: torch.Tensor | None = None
    ) -> str | None:
        """What is wrong with the layer, in a sentence; None if it computes what is `expected`, float32 [rows, 2].

        Args:
            tokens: so many rows r, -r, r, ... are multiplied.
            before: what was expected of the weights before.
        """
        device = self._device
        expected = expected.cpu()
        known = (~expected[:, 0].isnan()).nonzero().flatten()
        if self.looks_up:
            known = known[:: max(1, -(-len(known) // LOOKED_UP))]
        y = self.products(proofs.tokens_of(self.input(vector), tokens).to(device), known).cpu()
        y = y if self.looks_up else y[:, known]
        # GPUs may be told to multiply float32 with the mantissa of TF32, which is that of float16.
        tf32 = device.type == "cuda" and self.dtype == torch.float32
        before = None if before is None else before[known]
        fault = proofs.fault(y, expected[known], self.columns, torch.float16 if tf32 else self.dtype, before)
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
            ops.bmm_cpu(taken, queries.contiguous(), one.impl._w_uk_packed, True, one.impl._w_scale)
        else:
            taken = torch.bmm(queries, one.W_UK_T)
        values = x.new_empty(len(x), heads * one.v_head_dim)
        one._v_up_proj(x.repeat(1, heads), values)
        y = torch.einsum("nkl,tl->tnk", taken.float(), x.float())
        return torch.cat([y, values.float().unflatten(1, (heads, -1))], 2).flatten(1)


@dataclass(frozen=True)
class Convolution(Proved):
    """The weight [out, 1, kernel] of a convolution of each channel by itself. Mixers read it where it was loaded."""

    def expected(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        # What vLLM has packed, on some CPUs, no product tells.
        return super().expected(stored) if self.layer.weight.dim() == 3 else None

    def products(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight.squeeze(1).float().T


@dataclass(frozen=True)
class Given(Proved):
    """A dense layer of this rank against what it held before it was packed.

    vLLM's models rearrange the rows of some linears as they load them, and scale those of some heads, so no proof of
    the checkpoint is of what they then hold. But that it is what they compute can be shown of some rows of it.
    """

    @classmethod
    def watched(cls, path: str, layer: torch.nn.Module) -> "Given":
        """`layer`, of which a proof is made each time that its method packs it."""
        looks_up = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
        found = cls(path, layer, (), *layer.weight.shape, layer.weight.dtype, looks_up)
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


class Prover:
    """Proves the layers of one model.

    Args:
        model: complete, and not loaded yet.
        taken: linear -> who loads its tensors in the place of the model.
        embeddings: the model has embeddings and a head of its own.
    """

    def __init__(
        self, config: RiaConfig, model: torch.nn.Module, taken: Mapping[str, Taker | None], embeddings: bool = True
    ):
        self.before: dict[str, torch.Tensor] = {}  # layer -> its proof when it was proved last
        self.layers = list(_layers(config, model, taken, embeddings))
        taken_apart = list(absorbed(model, self.layers))
        emptied = {id(one.layer) for one in taken_apart if one.is_packed}
        self.layers = [one for one in self.layers if id(one.layer) not in emptied or one.is_pruned] + taken_apart
        kinds = (LinearBase, VocabParallelEmbedding) if embeddings else LinearBase
        known = {id(one.layer) for one in self.layers}
        self.unknown = [
            (path, layer)
            for path, layer in model.named_modules()
            if isinstance(layer, kinds) and id(layer) not in known and id(_source(layer)) not in known
        ]
        dense = {id(layer) for _, layer in dense_layers(model, embeddings) if not is_in_int8(layer)}
        dense -= {id(getattr(module, "kv_b_proj", None)) for module in model.modules()}  # attention may empty it
        self.given = [
            Given.watched(path, layer) for path, layer in self.unknown if id(layer) in dense and layer.weight.dim() == 2
        ]
        self.experts = []
        if any(hasattr(layer, "expert_map_manager") for layer in model.modules()):
            from ria_vllm.serve.proving.experts import proved_experts  # imports kernels for them

            self.experts = list(proved_experts(config, model))

    def prove(
        self,
        vector: Vector,
        stored: Mapping[str, torch.Tensor],
        where: str,
        made: tuple[Vector, Mapping[str, torch.Tensor]] | None = None,
    ) -> int:
        """Prove all layers, and say in the log how many have shown it, and how many have new weights without a proof.
        Returns the number of matrices that were proved.

        Args:
            vector: r, float32, of so many channels.
            stored: matrix -> its proof, float32 [out, 2]; NaN in the rows that have none.
            where: the folder or repository, for errors.
            made: r, and `FileProofs.found_of_experts`.

        Raises:
            RiaError: names the layers that compute something else.
        """
        start, proved = time.perf_counter(), set[str]()
        problems, asked, given = [], set(), 0
        unproved = [path for path, layer in self.unknown if _is_new(layer)]
        for layer in self.layers:
            expected = self._expected(layer, stored)
            if expected is None or bool(expected[:, 0].isnan().all()):
                unproved += (layer.matrices or [layer.path]) if _is_new(layer.layer) else []
                continue
            tokens = 1 if layer.kernels in asked else proofs.TOKENS
            asked.add(layer.kernels)
            problems.append(self._problem(layer, vector, expected, tokens))
            proved.update(layer.matrices or [layer.path])
        for layer in self.given:
            if (expected := layer.expected(stored)) is not None and _is_new(layer.layer):
                problems.append(self._problem(layer, vector, expected, 1))
                given += 1
        for experts in self.experts:
            if experts.can_be_proved(stored):
                problems.append(experts.problem(vector, stored, whole=True))
            elif made is not None and experts.can_be_proved(made[1]):
                problems.append(experts.problem(*made, whole=False))
            else:
                unproved += (experts.matrices or [experts.path]) if _is_new(experts.layer) else []
                if experts.given and _is_new(experts.layer):
                    problems.append(experts.problem(foreign_vector, experts.given, whole=False))
                    given += 1
                continue
            proved.update(experts.matrices)
        problems = [problem for problem in problems if problem is not None]
        if problems:
            more = f" And {len(problems) - 1} other layers." if len(problems) > 1 else ""
            raise RiaError(
                f"{where}: {problems[0]}.{more} `ria-vllm verify` checks the files; get them again. If they are right, "
                f"report this; `ria-vllm export` makes a dense folder."
            )
        took, others = time.perf_counter() - start, ", ".join(unproved[:3])
        left = f"; without a proof: {len(unproved)}, the first of which are {others}" if unproved else ""
        left += f"; of these, {given} layers compute what was loaded into them" if given else ""
        logger.info("ria-vllm: %d matrices compute what the checkpoint says (%.2f s%s).", len(proved), took, left)
        return len(proved)

    def _problem(self, layer: Proved, vector: Vector, expected: torch.Tensor, tokens: int) -> str | None:
        before, self.before[layer.path] = self.before.get(layer.path), expected
        return layer.problem(vector, expected, tokens, before)

    def _expected(self, layer: Proved, stored: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if layer.loads:
            return layer.expected(stored)
        weight = getattr(layer.layer, "weight", None)
        if weight is None:
            return None
        others = (one for one in self.layers if one.loads and getattr(one.layer, "weight", None) is weight)
        source = next(others, None)
        return None if source is None else source.expected(stored)


def _layers(
    config: RiaConfig, model: torch.nn.Module, taken: Mapping[str, Taker | None], embeddings: bool
) -> Iterator[Proved]:
    """The layers whose products are those of matrices in the checkpoint."""
    dense = dict(dense_layers(model, embeddings))
    paths = {path for path, layer in dense.items() if isinstance(layer, VocabParallelEmbedding)}
    tables = {
        path: [(name, shard)]
        for name in sorted((config.stored or set()) - config.expert_linears)
        for path, shard in destinations(model, name) or ()
        if path in paths and shard is None
    }
    for path, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase) and isinstance(method, Sparse24LinearMethod):
            shards = zip(method.names, method.layer_loader.shards.shard_ids)
            loads = tuple(
                (
                    name,
                    partial(_take, taken[name], layer) if taken.get(name) else partial(_send, method.row_loader, shard),
                )
                for name, shard in shards
            )
            yield Proved(path, layer, loads, sum(method.output_sizes), layer.input_size, method.dtype)
        elif path in dense and is_in_int8(layer):
            loads = tuple((name, partial(_send, layer.weight_loader, shard)) for name, shard in tables.get(path, []))
            for looks_up in [True] * method.looks_up + [False] * method.multiplies:
                yield Proved(path, layer, loads, method.rows, method.columns, method.dtype, looks_up)
        elif path in dense and _keeps_weight(config, layer):
            rows, columns = layer.weight.shape[0], getattr(layer, "input_size", layer.weight.shape[1])
            matrices = _linears(model, path, layer) if isinstance(layer, LinearBase) else tables.get(path, [])
            loads = tuple((name, partial(_send, layer.weight.weight_loader, shard)) for name, shard in matrices)
            if layer.weight.dim() == 3:
                yield Convolution(path, layer, loads, rows, layer.weight.shape[2], layer.weight.dtype)
            elif loads or isinstance(layer, ParallelLMHead):
                looks_up = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
                yield Proved(path, layer, loads, rows, columns, layer.weight.dtype, looks_up)


def absorbed(model: torch.nn.Module, layers: list[Proved]) -> Iterator[Absorbed]:
    """What latent attention takes out of the layers."""
    for path, attention in model.named_modules():
        if hasattr(attention, "kv_b_proj") and hasattr(attention, "impl"):
            for one in layers:
                if one.layer is attention.kv_b_proj:
                    yield Absorbed(path, one.layer, one.loads, one.rows, one.columns, one.dtype, attention=attention)


def _is_new(layer: torch.nn.Module) -> bool:
    """Whether its weights came in the load that has just ended, see `ria_vllm.serve.load.layerwise.Reloads`."""
    return layer.__dict__.get("ria_renewed", True)


def _source(layer: torch.nn.Module) -> torch.nn.Module | None:
    """The embedding whose int8 a tied head multiplies with, or None. What the embedding multiplies is proved."""
    return getattr(layer.quant_method, "source", None)


def _keeps_weight(config: RiaConfig, layer: torch.nn.Module) -> bool:
    """Whether a dense layer has its matrix as the checkpoint stores it.

    Models may rearrange rows of linears, or scale those of the head.
    """
    scaled = config.scales_head and isinstance(layer, ParallelLMHead)
    rearranged = config.rearranged and isinstance(layer, LinearBase)
    is_convolution = layer.weight.dim() == 3 and layer.weight.shape[1] == 1
    return (layer.weight.dim() == 2 or is_convolution) and not (rearranged or scaled)


def _linears(model: torch.nn.Module, path: str, layer: LinearBase) -> list[tuple[str, ShardId]]:
    """(linear of the checkpoint, shard) of a dense layer; empty if it is not known how vLLM divides it."""
    linears = getattr(model, "ria_linears", {}).get(path, ())
    try:
        ids = ShardMap.of(layer, linears, len(getattr(layer, "output_sizes", None) or [0])).shard_ids
    except RiaError:
        return []
    return list(zip(linears, ids)) if len(ids) == len(linears) else []


def _send(
    load: Callable[..., None], shard: ShardId, parameter: ChannelQuantScaleParameter, proof: torch.Tensor
) -> None:
    load(parameter, proof, *(() if shard is None else (shard,)))


def _take(take: Taker, layer: LinearBase, parameter: ChannelQuantScaleParameter, proof: torch.Tensor) -> None:
    """`take` finds the parameter on the layer, where those of the weights are while it is loaded."""
    parameter.weight_loader = layer.quant_method.row_loader
    layer.proof = parameter
    try:
        take("proof", proof)
    finally:
        del layer.proof

"""Whether each layer of a model computes what its checkpoint says, through the very path that serves it.

A checkpoint has a proof of each matrix, see `ria_vllm.format.proofs`: what it makes of a vector r. Once weights are
loaded and packed, each layer of this rank multiplies r with its kernel. Which rows it has, and in what order, is
learned by sending the proofs through the loaders that its weights came through.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.serve.linear.method import Sparse24LinearMethod
from ria_vllm.serve.load.completeness import dense_layers, is_in_int8
from ria_vllm.serve.load.file_proofs import foreign_vector
from ria_vllm.serve.load.model_paths import destinations
from ria_vllm.serve.load.shards import ShardId, ShardMap
from ria_vllm.serve.load.stream import Taker
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.proving.proved import Absorbed, Convolution, Given, Proved, Vector

logger = init_logger("vllm.ria")


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
        self.layers: list[Proved] = list(_layers(config, model, taken, embeddings))
        taken_apart = list(absorbed(model, self.layers))
        emptied = {id(one.layer) for one in taken_apart if one.is_packed}
        left = (one for one in self.layers if id(one.layer) not in emptied or one.is_pruned)
        self.layers = [*left, *taken_apart]
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
        made: tuple[Vector, Mapping[str, torch.Tensor]],
    ) -> None:
        """Prove all layers, and say in the log how many have shown it, and how many are without a proof.

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
        unproved = [path for path, _ in self.unknown]
        for layer in self.layers:
            expected = self._expected(layer, stored)
            if expected is None or bool(expected[:, 0].isnan().all()):
                unproved += layer.matrices or [layer.path]
                continue
            tokens = 1 if layer.kernels in asked else proofs.TOKENS
            asked.add(layer.kernels)
            problems.append(layer.problem(vector, expected, tokens))
            proved.update(layer.matrices or [layer.path])
        for layer in self.given:
            if (expected := layer.expected(stored)) is not None:
                problems.append(layer.problem(vector, expected, 1))
                given += 1
        for experts in self.experts:
            if experts.can_be_proved(stored):
                problems.append(experts.problem(vector, stored, whole=True))
            elif experts.can_be_proved(made[1]):
                problems.append(experts.problem(*made, whole=False))
            else:
                unproved += experts.matrices or [experts.path]
                if experts.given:
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
        unproved = list(dict.fromkeys(unproved))  # a matrix may be that of two layers
        took, others = time.perf_counter() - start, ", ".join(unproved[:3])
        left = f"; without a proof: {len(unproved)}, the first of which are {others}" if unproved else ""
        left += f"; of these, {given} layers compute what was loaded into them" if given else ""
        logger.info("ria-vllm: %d matrices compute what the checkpoint says (%.2f s%s).", len(proved), took, left)

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
        for name in sorted(config.stored - config.expert_linears)
        for path, shard in destinations(model, name) or ()
        if path in paths and shard is None
    }
    for path, layer in model.named_modules():
        method: Any = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase) and isinstance(method, Sparse24LinearMethod):
            takes = map(taken.get, method.names)
            loads = tuple(
                (name, partial(_take, take, layer) if take else partial(_send, method.row_loader, shard))
                for name, take, shard in zip(method.names, takes, method.layer_loader.shards.shard_ids)
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
                yield Convolution(
                    path, layer, loads, rows, layer.weight.shape[2], layer.weight.dtype, place=layer.weight.data
                )
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

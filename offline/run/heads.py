"""Which heads and input embeddings are stored in int8."""

import torch
from torch import nn

from ria_vllm.format import int8_rows
from ria_vllm.offline.model.run.architecture import output_heads
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.vllm_quirks import changes_head


def embeddings_in_int8(model: StreamedModel, recipe: Recipe) -> frozenset[str]:
    """The written names of the weights that are stored in int8 where pruned linears have integers: those of heads and
    of the input embeddings, tied or not."""
    if not recipe.has_integers or changes_head(model.config):
        return frozenset()
    tied, direct = model.model.all_tied_weights_keys, model.names.direct
    inputs = model.model.get_submodule(model.base_path).get_input_embeddings()
    modules = (*output_heads(model.model, model.decoder_path), inputs)
    chosen = {id(module) for module in modules if isinstance(module, nn.Linear | nn.Embedding)}
    found = set()
    for path, module in model.model.named_modules():
        if id(module) not in chosen or module.weight.shape[1] % int8_rows.COLUMNS_MULTIPLE:
            continue
        source = tied.get(f"{path}.weight", f"{path}.weight")
        names = {source, *(name for name, other in tied.items() if other == source)}
        stored = [name for name in names if name in direct]
        if len(stored) != 1:  # two copies of one tensor: vLLM would have a head of its own for the second
            continue
        written = direct[stored[0]]
        ignored = any(recipe.ignores(name.removesuffix(".weight")) for name in {*names, written})
        reads = written.endswith(".weight") and model.names.is_found_compressed(stored[0].removesuffix(".weight"))
        if reads and not ignored:
            found.add(written)
    return frozenset(found)


def head_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored of a head or embedding with the written name `name`: in int8, unless a value is not finite.

    Args:
        weight: [out, in]. The scale of a row fits its largest magnitude: with 127 steps, clipping it gains nothing.
    """
    if not bool(weight.isfinite().all()):
        return {name: weight}
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": tensor for part, tensor in int8_rows.encode(weight).items()}

"""Which heads are stored in int8, with the embeddings that they are tied to."""

import torch
from torch import nn

from ria_vllm.format import int8_rows
from ria_vllm.offline.model.run.architecture import output_heads
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.vllm_quirks import changes_head


def heads_in_int8(model: StreamedModel, recipe: Recipe) -> frozenset[str]:
    """The written names of the weights that are stored in int8: those of heads, where pruned linears have integers."""
    if not recipe.has_integers or changes_head(model.config):
        return frozenset()
    tied, direct = model.model.all_tied_weights_keys, model.names.direct
    heads = {id(head) for head in output_heads(model.model, model.decoder_path) if isinstance(head, nn.Linear)}
    found = set()
    for path, module in model.model.named_modules():
        if id(module) not in heads or module.in_features % int8_rows.COLUMNS_MULTIPLE:
            continue
        names = {f"{path}.weight", tied.get(f"{path}.weight", f"{path}.weight")}
        written = {direct[name] for name in names if name in direct}
        # Two copies of one tensor: vLLM would have a head of its own for the second.
        ignored = any(recipe.ignores(name.removesuffix(".weight")) for name in {*names, *written})
        if len(written) == 1 and not ignored and all(name.endswith(".weight") for name in written):
            found |= written
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

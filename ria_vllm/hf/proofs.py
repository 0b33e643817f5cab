"""Whether a model that transformers has loaded holds the matrices that its checkpoint was written with."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ria_vllm.format import proofs
from ria_vllm.format.schema import RiaSchema
from ria_vllm.hf.placement import Placement

Rounded = Mapping[str, torch.dtype]
"""Pruned linear -> the dtype to which its weights were rounded as they were loaded; float32 if they were not."""


def disproved(
    model: Any,
    placements: Mapping[str, Placement],
    rounded: Rounded,
    made: Collection[str],
    schema: RiaSchema,
    stored: Mapping[str, torch.Tensor],
) -> Iterator[str]:
    """The matrices of a loaded model that are not those of its checkpoint, by their names there.

    Parameters that this process does not have, or not as a whole, are passed over.

    Args:
        made: parameters that transformers has made of other tensors; nothing is known of these.
        stored: matrix -> its proof, float32 [out, 2].
    """
    for name, weight, dtype, padding in _matrices(model, placements, rounded, made, stored):
        found = proofs.proof(weight, schema.proof_vector(weight.shape[1]))
        proof = stored.get(name)
        if proof is None or len(proof) != len(found):
            yield name
            continue
        limit = proofs.bound(proof, weight.shape[1], dtype)
        if padding is not None:
            limit[padding] = torch.inf
        if not bool(((found - proof)[:, 0].abs() <= limit).all()):
            yield name


def _matrices(
    model: Any,
    placements: Mapping[str, Placement],
    rounded: Rounded,
    made: Collection[str],
    stored: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor, torch.dtype, int | None]]:
    """(name in the checkpoint, weight [out, in], the dtype to which it may have been rounded, the row of an embedding
    that pads, which some models empty)."""
    prefix = f"{model.base_model_prefix}."
    for path, parameter in model.named_parameters():
        weight = parameter.detach()
        if weight.is_meta or type(weight) is not torch.Tensor or not weight.numel():
            continue
        if path in placements:
            for name, part in placements[path].split(weight):
                yield name, part, rounded[name], None
        elif path.endswith(".weight") and proofs.is_matrix(weight.shape) and path not in made:
            module = path.removesuffix(".weight")
            known = [name for name in (module, prefix + module, module.removeprefix(prefix)) if name in stored]
            if known:
                padding = getattr(model.get_submodule(module), "padding_idx", None)
                yield known[0], weight.flatten(1), weight.dtype, padding

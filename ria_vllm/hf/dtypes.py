"""Which tensors of a model transformers keeps in float32, whatever dtype the model has."""

from typing import Any

import torch

from ria_vllm.errors import RiaError


def kept_dtypes(model: Any, dtype: torch.dtype | None, place: str) -> dict[str, torch.dtype]:
    """Tensor of the model -> the dtype that it has in place of the model's own, where `from_pretrained` loads it.

    Args:
        model: of transformers; may be on the meta device.
        dtype: the model's own; None: none in particular.
        place: the folder or the model, for the error.

    Raises:
        RiaError: this version of transformers does not say which these are.
    """
    if dtype in (None, torch.float32):
        return {}
    # A version that does not have these attributes may keep tensors in float32 and say so elsewhere.
    asked = [getattr(model, name, "unknown") for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    if not any(asked):
        return {}
    try:
        from transformers.core_model_loading import build_glob_alternation

        plan = model._get_dtype_plan(dtype)
        if not plan:
            return {}
        kept, _, globs = build_glob_alternation(list(plan))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RiaError(
            f"{place}: this version of transformers does not say which tensors of a {type(model).__name__} stay in "
            "float32. Give --compute-dtype float32 (from_pretrained: dtype=torch.float32), or install another version."
        ) from error
    found = {name: kept.search(name) for name in model.state_dict(keep_vars=True)}
    return {name: plan[globs[match.lastgroup]] for name, match in found.items() if match is not None}

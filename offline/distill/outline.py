"""A model without its weights, to ask what it consists of."""

from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.architecture import model_class, output_head
from ria_vllm.offline.model.hf import explained, read_config


def outline(name: str) -> Any:
    """The model of a folder or hub id on the meta device, without weights.

    Raises:
        RiaError: transformers cannot build it, or it gives no logits.
    """
    config = read_config(name)
    kind = model_class(name, config)
    with explained(f"{name}: transformers cannot build this model"), torch.device("meta"):
        model: Any = kind._from_config(config)
    if output_head(model) is None:
        raise RiaError(f"{name}: a {kind.__name__} gives no logits of tokens, so it cannot be distilled.")
    return model

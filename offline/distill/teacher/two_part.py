"""A model's hidden states and its logits, apart, so that the logits of a whole sequence never exist at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline.model.run.architecture import find_base, find_decoder, output_head

# Tokens whose logits are in memory at a time.
CHUNK = 256


class TwoPart:
    """A causal LM as the function from tokens to hidden states and that from hidden states to logits.

    The second is the model's own forward pass, with the hidden states in the place of what its decoder computes. So
    whatever the model does to its logits (a bias, a scale, a soft cap) is done.

    Args:
        model: of transformers.
        name: what the user calls it, for errors.

    Attributes:
        decoder: the path of the text decoder.
        base: the module that computes the hidden states.
        layers: the decoder layers.

    Raises:
        RiaError: no logits, no decoder layers, or logits that are NaN or come from more than the last hidden states.
    """

    def __init__(self, model: Any, name: str):
        if output_head(model) is None:
            raise RiaError(f"{name}: a {type(model).__name__} gives no logits of tokens, so it cannot be distilled.")
        decoder, layers = find_decoder(model, name)
        self.model, self.name, self.decoder = model, name, decoder
        self.layers: nn.ModuleList = model.get_submodule(layers)
        # Most models call the outermost module that has no head; OPT calls the decoder inside it.
        base, owner = find_base(model, decoder), layers.rpartition(".")[0]
        paths = [owner[:end] for end in range(len(owner) + 1) if owner[end : end + 1] in (".", "")]
        paths = [base, *(path for path in paths if not base or path.startswith(f"{base}."))]
        if not any(path and self._fits(model.get_submodule(path)) for path in paths):
            raise RiaError(
                f"{name}: the logits of a {type(model).__name__} do not follow from its last hidden states alone, "
                "which distillation needs."
            )

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden] for int64 [batch, tokens]: what the head reads."""
        return self.base(input_ids=tokens, use_cache=False)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] for [tokens, hidden], in the dtype that the model gives them."""
        with _instead(self.base, self._output(last_hidden_state=hidden[None])):
            # The embeddings are not read, but models ask for some input.
            logits = type(self.model).forward(self.model, inputs_embeds=hidden[None], use_cache=False).logits
        return logits.squeeze(0)  # by [0], the gradient would be copied into zeros

    @torch.no_grad()
    def _fits(self, base: nn.Module) -> bool:
        """Whether the model's logits follow from what `base` computes; keeps it if they do."""
        tokens = torch.arange(2, 10, device=self.model.device)[None]
        whole = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        self.base, self._output = base, type(base(input_ids=tokens, use_cache=False))
        if bool(whole.isnan().any()):
            way_out = "" if self.model.dtype == torch.float32 else ", or give --compute-dtype float32"
            raise RiaError(
                f"{self.name}: computes NaN in {name_of(self.model.dtype)}. Check that the model works{way_out}."
            )
        apart = self.logits(self.hidden(tokens)[0]).float()
        return whole.shape == apart.shape and torch.allclose(whole, apart, rtol=1e-3, atol=1e-3)


@contextmanager
def _instead(module: nn.Module, output: Any) -> Iterator[None]:
    """Make a module return `output`, whatever it is called with."""
    before = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]

"""Hidden states and logits apart, against a model's whole forward pass."""

import pytest
import torch
from decoders import small
from transformers import AutoConfig, AutoModel

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.logits import TwoPart

FAMILIES = ["llama", "gemma2", "cohere2", "granite", "opt", "bloom", "gpt_neox", "phi3", "qwen3", "qwen2_moe"]
FAMILIES += ["llama4_text"]  # which does not say where its decoder is


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_forward_pass(family):
    changes = {"gemma2": {"final_logit_softcapping": 0.5}, "cohere2": {"logit_scale": 0.1}}
    changes["granite"] = {"logits_scaling": 7.0}
    model = small(family, **changes.get(family, {}))
    apart, tokens = TwoPart(model, family), torch.arange(3, 40)[None]
    hidden = apart.hidden(tokens)
    parts = [apart.logits(hidden[0, rows]) for rows in (slice(0, 10), slice(10, None))]
    whole = model(input_ids=tokens).logits[0]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert len(apart.layers) == 2
    assert "forward" not in vars(apart.base)


def test_a_model_without_logits_is_refused(tiny):
    model = AutoModel.from_config(AutoConfig.from_pretrained(tiny("llama")))
    with pytest.raises(RiaError, match="the-model: .* gives no logits"):
        TwoPart(model, "the-model")


def test_logits_that_need_more_than_hidden_states_are_refused(monkeypatch):
    model = small("llama")
    forward = type(model).forward

    def other(self, input_ids=None, inputs_embeds=None, **options):
        out = forward(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        if input_ids is not None:
            out.logits = out.logits + input_ids[..., None]
        return out

    monkeypatch.setattr(type(model), "forward", other)
    with pytest.raises(RiaError, match="do not follow from its last hidden states"):
        TwoPart(model, "the-model")

"""A model's hidden states and logits, apart, against its whole forward pass; and a teacher that computes no numbers."""

import pytest
import torch
from decoders import small
from transformers import AutoConfig, AutoModel

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.teacher.teacher import read
from ria_vllm.offline.distill.teacher.two_part import TwoPart

# The last of them does not say where its decoder is.
FAMILIES = ["llama", "gemma2", "cohere2", "granite", "opt", "bloom", "gpt_neox", "qwen2_moe", "llama4_text"]


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
    with pytest.raises(RiaError, match="the-model"):
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
    with pytest.raises(RiaError, match="last hidden states"):
        TwoPart(model, "the-model")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_is_no_model_is_not_taken_for_training_that_diverges(value):
    model = TwoPart(small("llama"), "teacher")
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(read(model, tokens), model.model.model(tokens).last_hidden_state[0])
    with torch.no_grad():
        model.model.model.norm.weight[3] = value
    with pytest.raises(RiaError, match="the teacher itself computes NaN or infinity"):
        read(model, tokens)
    if value is torch.nan:
        with pytest.raises(RiaError, match="computes NaN"):
            TwoPart(model.model, "teacher")

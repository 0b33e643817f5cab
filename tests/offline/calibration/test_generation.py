"""The text that the dense model writes, by models that keep different things of what they have read."""

from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from zoo.toy import build
from zoo.toys import TOYS

from ria_vllm.offline.calibration.data import from_model
from ria_vllm.progress import Monitor

SEED = 3
# The configurations of these have no such keys.
NO_ATTENTION = dict.fromkeys(["num_attention_heads", "num_key_value_heads"])


def toy(name: str, folder: Path) -> Path:
    found = TOYS[name]
    return build(name, replace(found, settings=found.settings | NO_ATTENTION) if name == "mamba2" else found, folder)


def written_without_cache(model, bos: int, samples: int, length: int) -> torch.Tensor:
    """By its own distribution, reading everything again for each token."""
    draw = torch.Generator().manual_seed(SEED)
    vocabulary = model.config.vocab_size
    tokens = torch.cat([torch.full((samples, 1), bos), torch.randint(vocabulary, (samples, 1), generator=draw)], 1)
    while tokens.shape[1] < length:
        with torch.no_grad():
            chances = model(input_ids=tokens, use_cache=False).logits[:, -1].float().softmax(-1)
        point = torch.rand(samples, 1, generator=draw) * chances.sum(-1, keepdim=True)
        following = (chances.cumsum(-1) <= point).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


@pytest.mark.parametrize("name", ["ernie4_5", "mamba2", "jamba"])
def test_what_a_model_keeps_of_a_text_does_not_change_what_it_writes(name, tmp_path):
    folder = toy(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    read, forward = [], model.forward

    @wraps(forward)
    def watched(*args, **kwargs):
        read.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    model.forward = watched
    found = from_model(model, 0, samples=3, seq_len=40, seed=SEED, monitor=Monitor(shown=False))
    assert read == [2] + [1] * 37
    assert torch.equal(found, written_without_cache(model, 0, 3, 40))
    assert len({*map(tuple, found.tolist())}) == 3 and len(found.unique()) > 20


def test_a_model_that_keeps_nothing_reads_all_again(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    forward, asked = model.forward, []

    @wraps(forward)
    def forgetful(use_cache, **kwargs):
        asked.append(use_cache)
        return CausalLMOutputWithPast(logits=forward(use_cache=use_cache, **kwargs).logits)

    model.forward = forgetful
    found = from_model(model, 0, samples=3, seq_len=40, seed=SEED, monitor=Monitor(shown=False))
    assert asked[1:] == [False] * 37
    assert torch.equal(found, written_without_cache(model, 0, 3, 40))

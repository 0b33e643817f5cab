"""The Llama model of gpu_session, dense and sparse, on a mocked Hopper; and the targets that times are judged by."""

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from benchmarks import gpu_decode, llama
from benchmarks.llama import Caches, DecoderLayer, Model, Shape, SparseLinear

SHAPE = Shape("tiny", 128, 192, 4, 2, 32, 2, 96, 16)


def generator():
    return torch.Generator().manual_seed(0)


def test_the_model_is_llama(mocked):
    """Against transformers' in float32, with the same cache."""
    g = generator()
    layers = [llama.random_layers(SHAPE, g)[0] for _ in range(SHAPE.layers)]
    caches = [Caches(SHAPE, 3, g) for _ in layers]
    words, norm = torch.randn(SHAPE.vocabulary, SHAPE.hidden, generator=g), torch.rand(SHAPE.hidden, generator=g)
    config = transformers.LlamaConfig(
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        num_hidden_layers=SHAPE.layers,
        vocab_size=SHAPE.vocabulary,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config).float().eval()
    past = DynamicCache(config=config)
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(words)
        theirs.model.norm.weight.copy_(norm)
        for index, (mine, layer) in enumerate(zip(layers, theirs.model.layers)):
            heads = [SHAPE.heads * SHAPE.head_dim, *[SHAPE.kv_heads * SHAPE.head_dim] * 2]
            attention, mlp = layer.self_attn, layer.mlp
            for linear, weight in [
                *zip((attention.q_proj, attention.k_proj, attention.v_proj), mine.qkv.weight.split(heads)),
                *zip((mlp.gate_proj, mlp.up_proj), mine.gate_up.weight.chunk(2)),
                (attention.o_proj, mine.o.weight),
                (mlp.down_proj, mine.down.weight),
            ]:
                linear.weight.copy_(weight)
            layer.input_layernorm.weight.copy_(mine.input_norm)
            layer.post_attention_layernorm.weight.copy_(mine.post_norm)
            past.update(caches[index].keys[:, :, :-1].float(), caches[index].values[:, :, :-1].float(), index)
        ids = torch.tensor([5, 7, 11])
        position = torch.full((3, 1), SHAPE.context - 1)
        expected = theirs(ids[:, None], past_key_values=past, position_ids=position).logits[:, 0]
        found = Model(layers, caches, words, norm).step(ids, DecoderLayer.forward, torch.float32)
    # The new keys and values are rounded to bfloat16, as the cache stores them.
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * expected.abs().max())
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def rows_of(found):
    return [row for row in found if "at" not in row]


@pytest.mark.parametrize("name", ["qkv", "down"])
def test_a_wrong_linear_fails_and_is_not_timed(small, monkeypatch, name):
    """Its input's channels under a wrong permutation."""
    right = DecoderLayer.__init__

    def spoiled(self, shape, linears, norms):
        if isinstance(linears[name], SparseLinear):
            columns = shape.linears[name][1]
            linears[name].permutation = torch.arange(columns).roll(1).int()
        right(self, shape, linears, norms)

    monkeypatch.setattr(DecoderLayer, "__init__", spoiled)
    rows = rows_of(gpu_decode.time_layer(gpu_decode.LAYERS[0]))
    assert rows and not any(row["ok"] for row in rows)

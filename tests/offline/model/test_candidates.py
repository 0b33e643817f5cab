"""Kinds of folds that no family of the other tests has, in layers made for them."""

import pytest
import torch
from decoders import described, layers_of, lines, small
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaAttention

TOKENS = torch.arange(40, 70).view(2, 15)


class Interleaved(nn.Module):
    """An MLP whose gate and up channels alternate."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(64, 192)
        self.down_proj = nn.Linear(96, 64)

    def forward(self, x):
        both = self.gate_up_proj(x)
        return self.down_proj(functional.silu(both[..., ::2]) * both[..., 1::2])


def attend(self, hidden_states, gate_of, **kwargs):
    """Attention with a gate on its output, without positions."""
    batch, tokens, _ = hidden_states.shape
    queries, gate = gate_of(self, hidden_states)
    read = [queries, self.k_proj(hidden_states), self.v_proj(hidden_states)]
    q, k, v = (one.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for one in read)
    k, v = (one.repeat_interleave(self.num_key_value_groups, 1) for one in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return self.o_proj(out.reshape(batch, tokens, -1) * gate.sigmoid()), None


def apart(self, x):
    return self.q_proj(x), self.gate_proj(x)


def behind_queries(self, x):
    return self.q_proj(x).chunk(2, -1)


def logits(model):
    with torch.no_grad():
        return model.double()(TOKENS, use_cache=False).logits


def test_gate_and_up_that_alternate():
    torch.manual_seed(0)
    model = small("llama")
    for layer in layers_of(model):
        layer.mlp = Interleaved().requires_grad_(False)
    (topology,) = described(model).kinds
    (fold,) = [line for line in lines(described(model)) if "<-" in line and "mlp" in line]
    assert fold == "  mlp.down_proj <- mlp.gate_up_proj[0:1]x96, mlp.gate_up_proj[1:2]x96"
    before, p = logits(model), torch.randperm(96)
    mlp = layers_of(model)[0].mlp
    rows = torch.stack([2 * p, 2 * p + 1], 1).flatten()
    mlp.gate_up_proj.weight.copy_(mlp.gate_up_proj.weight[rows])
    mlp.gate_up_proj.bias.copy_(mlp.gate_up_proj.bias[rows])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, p])
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert topology.folds[-1].producers[0].blocks == 96


@pytest.mark.parametrize(("gate_of", "rows"), [(apart, "gate_proj[0:64]"), (behind_queries, "q_proj[64:128]")])
def test_gates_on_the_output_of_attention(gate_of, rows, monkeypatch):
    torch.manual_seed(0)
    model = small("llama")
    for layer in layers_of(model):
        if gate_of is apart:
            layer.self_attn.gate_proj = nn.Linear(64, 64).requires_grad_(False)
        else:
            layer.self_attn.q_proj = nn.Linear(64, 128).requires_grad_(False)
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, **kwargs: attend(self, gate_of=gate_of, **kwargs))
    found = list(lines(described(model)))
    assert f"  self_attn.o_proj <- self_attn.v_proj, self_attn.{rows} 4/2" in found
    before = logits(model)
    attention = layers_of(model)[0].self_attn
    inner = [torch.randperm(16), torch.randperm(16)]
    values = torch.cat([head * 16 + order for head, order in enumerate(inner)])
    p = torch.cat([head * 16 + inner[head // 2] for head in range(4)])
    attention.o_proj.weight.copy_(attention.o_proj.weight[:, p])
    attention.v_proj.weight.copy_(attention.v_proj.weight[values])
    gate, start = (attention.gate_proj, 0) if gate_of is apart else (attention.q_proj, 64)
    for part in (gate.weight, gate.bias):
        part[start : start + 64] = part[start + p].clone()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)

"""What vLLM's latent attention has taken out of kv_b_proj, as vLLM itself takes it."""

import pytest
import torch
from vllm.model_executor.layers.attention import MLAAttention, mla_attention
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.v1.attention.backends.mla.amx_mla import AMXMLAImpl

from ria_vllm.format import proofs
from ria_vllm.serve.proving.layers import absorbed
from ria_vllm.serve.proving.proved import Proved

HEADS, KEYS, VALUES, WIDTH = 4, 64, 32, 128


class Plain:
    """Packs nothing of its own."""

    def process_weights_after_loading(self, dtype):
        pass


class Latent(MLAAttention):
    """As far as weights go."""

    def __init__(self, layer, impl):
        torch.nn.Module.__init__(self)
        self.kv_b_proj, self.impl, self.is_amx_bmm_enabled = layer, impl, isinstance(impl, AMXMLAImpl)
        for one in (self, impl):
            one.num_heads, one.kv_lora_rank, one.qk_nope_head_dim, one.v_head_dim = HEADS, WIDTH, KEYS, VALUES
        impl.kv_b_proj = layer
        self.dcp_q_replicate = self.is_aiter_triton_fp4_bmm_enabled = self.is_aiter_triton_fp8_bmm_enabled = False
        self.quant_config = None


@pytest.mark.parametrize("kind", [Plain, AMXMLAImpl])
def test_what_it_takes_is_proved(ranks, monkeypatch, kind):
    monkeypatch.setattr(mla_attention, "set_default_quant_scales", lambda *_, **__: None)
    if kind is AMXMLAImpl and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM packs it on CPUs with AMX only")
    rows = HEADS * (KEYS + VALUES)
    weight = (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)) / 11).bfloat16()
    layer = ColumnParallelLinear(WIDTH, rows, bias=False, params_dtype=torch.bfloat16)

    def send(parameter, proof):
        parameter.data.copy_(proof)

    plain = Proved("kv_b_proj", layer, (("kv_b", send),), rows, WIDTH, torch.bfloat16)
    attention = Latent(layer, kind.__new__(kind))
    (one,) = absorbed(torch.nn.Sequential(attention), [plain])
    r = proofs.vector(WIDTH, 1)
    stored = {"kv_b": proofs.proof(weight, r)}
    assert one.is_packed or one.expected(stored) is None, "it has taken nothing yet"

    def problem(changed):
        layer.weight = torch.nn.Parameter(changed.clone(), requires_grad=False)
        attention.process_weights_after_loading(torch.bfloat16)
        return one.problem(lambda size: r, one.expected(stored), proofs.TOKENS)

    heads = weight.view(HEADS, KEYS + VALUES, WIDTH)
    assert problem(weight) is None
    for changed in (
        heads.roll(1, 0),
        torch.cat([heads[:, VALUES:], heads[:, :VALUES]], 1),  # values before keys
        heads * 1.02,
        torch.cat([heads[:, :KEYS], heads[:, KEYS:].flip(1)], 1),
        torch.cat([heads[:, :KEYS].flip(2), heads[:, KEYS:]], 1),
    ):
        assert "kv_b (absorbed by latent attention): " in problem(changed.reshape(rows, WIDTH))

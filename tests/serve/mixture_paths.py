"""Who computes the experts of a mixture layer in the tests: the fixture `experts_path`."""

import pytest
import torch

from ria_vllm.serve.kernels import experts_registry
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel


class DecompressingKernel:
    """An `ExpertsKernel` in plain torch."""

    name = "decompressing"
    is_fallback = False
    formats: tuple[str, ...] = ("float", "int8", "fp8")

    @staticmethod
    def is_supported(device):
        return None

    @classmethod
    def can_implement(cls, config):
        return None if config.weight_format.name in cls.formats and config.input_dtype is None else "format"

    @staticmethod
    def pack(config, gate_up, down, gate_up_bias, down_bias):
        def dense(parts, columns):
            one = [{name: part[e] for name, part in parts.items()} for e in range(config.num_experts)]
            matrices = torch.stack([config.weight_format.decode(parts, torch.float32) for parts in one])
            assert not matrices[..., columns:].any()
            return matrices[..., :columns].contiguous()

        assert (gate_up_bias is not None) == (down_bias is not None) == config.has_bias
        biases = [bias.clone() for bias in (gate_up_bias, down_bias) if bias is not None]
        return dense(gate_up, config.hidden_size), dense(down, config.intermediate_size), *biases

    @staticmethod
    def apply(config, x, topk_weights, topk_ids, packed, input_permutation, expert_map):
        gate_up, down, *biases = packed
        ordered = x if input_permutation is None else x[:, input_permutation.long()]
        y = torch.zeros_like(x)
        for token, expert in [(t, i) for t in range(len(x)) for i in range(topk_ids.shape[1])]:
            e, weight = int(topk_ids[token, expert]), topk_weights[token, expert]
            e = e if expert_map is None else int(expert_map[e])
            if e < 0:
                continue
            t = ordered[token] * (weight if config.router_weight_on_input else 1)
            product = gate_up[e] @ t + (biases[0][e] if biases else 0)
            gate, up = product.split(config.intermediate_size)
            limit = config.activation.limit
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            h = gate * torch.sigmoid(config.activation.alpha * gate) * (up + config.activation.beta)
            y[token] += (down[e] @ h + (biases[1][e] if biases else 0)) * (
                1 if config.router_weight_on_input else weight
            )
        return y


@pytest.fixture(params=["vllm", "torch", "cpu", "reference"])
def experts_path(request, monkeypatch):
    """Who computes: vLLM's own experts, the kernel above, or one of ours."""
    kernels = {"vllm": (ReferenceExpertsKernel,), "torch": (DecompressingKernel,)}
    monkeypatch.setattr(experts_registry, "KERNELS", kernels.get(request.param, experts_registry.KERNELS))
    if request.param == "reference":
        monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    return request.param


def close(got, want):
    assert want.std() > 0.3
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)  # float32 sums of up to 128 products

"""Every kind of fold against the model's own forward pass in float64, with permutations made by hand."""

import pytest
import torch
from decoders import calls_of, check_same, described, in_float64, layers_of, small
from transformers.models.llama.modeling_llama import LlamaAttention

from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.offline.model.experiments.candidates import head_counts
from ria_vllm.offline.model.experiments.experiment import Experiment
from ria_vllm.offline.model.experiments.folds import holds

TOKENS = torch.arange(40, 70).view(2, 15)
# One family for each kind of fold.
FAMILIES = {
    "llama": {},
    "llama-mha": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama-mqa": {"num_key_value_heads": 1},
    "phi3": {},
    "opt": {},
    "olmo2": {},
    "cohere2": {},
    "starcoder2": {},
    "stablelm": {"use_qkv_bias": True},
    "gemma4_text": {},
    "gpt_neox": {},
    "qwen3_next": {},
    "qwen3_5_text": {},
    "granitemoehybrid": {},
    "mixtral": {},
    "gpt_oss": {},
    "falcon": {},
    "gpt_bigcode": {},
    "nemotron_h": {},
    "deepseek_v3": {},
    "deepseek_v3-as-wide-keys": {"qk_nope_head_dim": 16},
    "deepseek_v3-twice-as-wide-values": {"v_head_dim": 32, "qk_nope_head_dim": 16},
    "minicpm3": {},
    "afmoe": {},
    "bloom": {},
    "gemma3n_text": {},
    "kimi_linear": {},
}

# Folds that no other family has: values in a fused tensor, head by head; low-rank pairs beside attention and inside.
OWN = {
    "bloom": {"self_attention.dense"},
    "gemma3n_text": {"laurel.linear_right"},
    "kimi_linear": {"self_attn.forget_gate.f_b_proj", "self_attn.g_b_proj"},
}


def rows_of(producer, total: int) -> list[int]:
    start, end = producer.rows or (0, total)
    size = total // producer.blocks
    return [block * size + row for block in range(producer.blocks) for row in range(start, end)]


def reorder(linear, rows: list[int], order: list[int]) -> None:
    for part in (linear.weight, linear.bias):
        if part is not None:
            part[rows] = part[[rows[i] for i in order]]


def apply(layer, fold, draw: torch.Generator) -> None:
    """Permute at random what the fold says can be permuted."""
    consumer = layer.get_submodule(fold.consumer)
    width = consumer.in_features
    if fold.coupling == "elementwise":
        p = inner = torch.randperm(width, generator=draw).tolist()
    else:
        size, share = width // fold.num_heads, fold.num_heads // fold.num_kv_heads
        heads = [torch.randperm(size, generator=draw).tolist() for _ in range(fold.num_kv_heads)]
        inner = [head * size + row for head, order in enumerate(heads) for row in order]  # of keys and values
        p = [query * size + row for query in range(fold.num_heads) for row in heads[query // share]]
    assert p != sorted(p)
    consumer.weight.copy_(consumer.weight[:, p])
    for producer in fold.producers:
        linear = layer.get_submodule(producer.name)
        rows = rows_of(producer, linear.out_features)
        order = inner if len(rows) == len(inner) else p
        assert len(rows) == len(order)
        reorder(linear, rows, order)


def apply_to_experts(module, draw: torch.Generator) -> None:
    """Permute the inner channels of each expert, each in another way."""
    inner = module.down_proj.shape[1 if module.is_transposed else 2]
    for expert in range(len(module.down_proj)):
        p = torch.randperm(inner, generator=draw)
        first, down = (module.gate_up_proj if module.has_gate else module.up_proj)[expert], module.down_proj[expert]
        first, down = (first.T, down.T) if module.is_transposed else (first, down)
        parts = [torch.arange(inner), torch.arange(inner) + inner] if module.has_gate else [torch.arange(inner)]
        if not module.is_concatenated:
            parts = [2 * torch.arange(inner), 2 * torch.arange(inner) + 1]
        for rows in parts:
            first[rows] = first[rows[p]]
            if module.has_bias:
                module.gate_up_proj_bias[expert, rows] = module.gate_up_proj_bias[expert, rows[p]]
        down.copy_(down[:, p])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fold_changes_nothing(family):
    model = small(family.partition("-")[0], **FAMILIES[family])
    topologies = described(model)
    in_float64(model)
    assert OWN.get(family, set()) <= {fold.consumer for kind in topologies.kinds for fold in kind.folds}
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        before = model(TOKENS).logits
        for index, layer in enumerate(layers_of(model)):
            folds = topologies.of(index).folds
            assert folds
            for fold in folds:
                path, _, expert = fold.consumer.partition(".{e}.")
                if expert:
                    apply_to_experts(layer.get_submodule(path), draw)
                else:
                    apply(layer, fold, draw)
        check_same(model(TOKENS).logits, before)
        fold = topologies.of(1).folds[0]
        consumer = layers_of(model)[1].get_submodule(fold.consumer)
        consumer.weight.copy_(consumer.weight.roll(1, 1))
        assert (model(TOKENS).logits - before).abs().max() > 1e-3 * before.abs().max()


def experiment(model_type: str, **changes) -> Experiment:
    model = small(model_type, **changes)
    call, stream = calls_of(model, torch.arange(2, 10)[None])[0]
    return Experiment(layers_of(model)[0], call, stream)


def attention(producer: Producer, heads: int = 4, kv_heads: int = 2, consumer: str = "self_attn.o_proj") -> Fold:
    return Fold(
        consumer=consumer, producers=[producer], coupling="heads", num_heads=heads, num_kv_heads=kv_heads
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "changes", "fold"),
    [
        ("llama", {}, attention(Producer(name="self_attn.k_proj"))),  # rotary embeddings pair channels
        ("llama", {"num_key_value_heads": 4}, attention(Producer(name="self_attn.v_proj"), 2, 2)),  # across two heads
        ("phi3", {}, attention(Producer(name="self_attn.qkv_proj", rows=(64, 96)))),  # the keys
        ("bitnet", {}, attention(Producer(name="self_attn.v_proj"))),  # a norm comes between
        (
            "gpt_neox", {},
            attention(Producer(name="attention.query_key_value", rows=(128, 192)), 4, 4, "attention.dense"),
        ),  # as if v followed q and k
        (
            "falcon", {},
            attention(Producer(name="self_attention.query_key_value", rows=(96, 128)), consumer="self_attention.dense"),
        ),  # the same
        (
            "gpt_bigcode", {}, attention(Producer(name="attn.c_attn", rows=(64, 80)), 4, 1, "attn.c_proj"),
        ),  # the keys
        ("qwen3_next", {"layer_types": ["full_attention"] * 2}, attention(Producer(name="self_attn.v_proj"))),  # gated
        *(
            ("llama", {}, Fold(consumer="mlp.down_proj", producers=[Producer(name=f"mlp.{x}")], coupling="elementwise"))
            for x in ("gate_proj", "up_proj")
        ),
    ],
)  # fmt: skip
def test_a_wrong_fold_does_not_hold(model_type, changes, fold):
    own = experiment(model_type, **changes)
    before = [parameter.clone() for parameter in own.layer.parameters()]
    assert not holds(own, fold)
    assert all(torch.equal(one, other) for one, other in zip(before, own.layer.parameters(), strict=True))


def test_a_norm_with_weights_of_one_would_let_a_wrong_fold_pass():
    """So the experiment draws the weights of norms, too."""
    own = experiment("bitnet")
    fold = attention(Producer(name="self_attn.v_proj"))
    own.layer.self_attn.attn_sub_norm.weight.data.fill_(1)
    own.output = own.run(own.stream)
    assert holds(own, fold)
    assert not holds(experiment("bitnet"), fold)


@pytest.mark.parametrize("start", [16, 100])
def test_what_begins_with_more_tokens_is_seen(start, monkeypatch):
    """Such as attention to compressed blocks that mixes the channels of the values."""
    real = LlamaAttention.forward

    def forward(self, hidden_states, **kwargs):
        mixed = hidden_states.shape[1] >= start
        hook = self.o_proj.register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1),) if mixed else args)
        try:
            return real(self, hidden_states, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    (topology,) = described(small("llama")).kinds
    assert [fold.consumer for fold in topology.folds] == ["mlp.down_proj"]
    attention, _ = topology.sublayers
    assert attention.stages[-1][0].heads is None and attention.stages[-1][0].within_ranks


def test_no_folds_in_experts_with_a_norm_inside(monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def forward(self, x, index, weights):
        gate, up = torch.nn.functional.linear(x, self.gate_up_proj[0]).chunk(2, -1)
        scale = torch.arange(gate.shape[-1], dtype=gate.dtype)
        return torch.nn.functional.linear(self.act_fn(gate) * up * scale, self.down_proj[0])

    monkeypatch.setattr(MixtralExperts, "forward", forward)
    (topology,) = described(small("mixtral")).kinds
    assert [fold.consumer for fold in topology.folds] == ["self_attn.o_proj"]


def test_head_counts_come_from_modules_and_configurations():
    class Module:
        head_dim = 32
        num_heads = 6

    class Refuses:
        @property
        def head_dim(self):
            raise RuntimeError("differs between layers")

        num_attention_heads = 4

    assert head_counts(192, Module(), Refuses()) == [4, 6]
    assert head_counts(128, Module(), Refuses()) == [4]


def test_an_experiment_leaves_the_layer_as_it_is():
    model = small("mixtral")
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    described(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())
    assert torch.get_default_dtype() == torch.float32

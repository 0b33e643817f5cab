"""What a smaller copy of a layer says is what the layer itself says, and widths are found without a list of them."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decoders import Halved, calls_of, described, lines, small
from expected_layers import OTHERS, TABLE
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.layer_schema import Fold, Producer
from ria_vllm.offline.model import smaller_copy
from ria_vllm.offline.model.architecture import find_base, find_decoder
from ria_vllm.offline.model.embedding import Embedder
from ria_vllm.offline.model.experiment import weights_of_copy
from ria_vllm.offline.model.shrink import likeness, smaller_configs
from ria_vllm.offline.model.smaller_copy import Whole, describe_smaller
from ria_vllm.offline.model.topology import Topologies, Topology, kinds_of
from ria_vllm.offline.model.transfer import Sized, transferred

TEXTS = [torch.arange(2, 10)[None], torch.arange(2, 102)[None]]
# Twice to four times as wide as the toys. Every number that a family knows is taken from here.
WIDE = {
    "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "ffn_dim": 384, "word_embed_proj_dim": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 192,
    "shared_intermediate_size": 192, "q_lora_rank": 96, "kv_lora_rank": 64, "global_head_dim": 64,
    "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_ssm": 512, "num_experts": 8, "num_local_experts": 8,
    "n_routed_experts": 8,
}  # fmt: skip
OWN = {
    "falcon": {"num_kv_heads": 4, "ffn_hidden_size": 384},
    "opt": {"num_key_value_heads": 8},
    "minicpm3": {"num_key_value_heads": 8},
    "deepseek_v3": {"num_key_value_heads": 8, "head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32},
}
# Layers that are not built from a configuration and a number alone are run as they are.
NO_COPY = ("bamba",)


class Calls(Embedder):
    """How an in-memory model calls its layers."""

    def __init__(self, model: nn.Module, tupled: int):
        self.model = SimpleNamespace(folder=Path("toy"), model=model, layer_prefix=lambda index: f"layers.{index}.")
        self.unusable, self.tupled = "toy", tupled


def wide(model_type: str, **changes) -> nn.Module:
    """A toy with larger widths."""
    known = small(model_type).config.to_dict()
    own = {name: value for name, value in WIDE.items() if known.get(name) is not None}
    return small(model_type, **own | OWN.get(model_type, {}) | changes)


def from_smaller_copies(model: nn.Module, enough: int = 1) -> list[Topology | None]:
    """The topology of each kind of layer."""
    decoder, layers = find_decoder(model, Path("toy"))
    whole = Whole(model, decoder, find_base(model, decoder), layers, Path("toy"))
    returned = []
    hook = model.get_submodule(layers)[0].register_forward_hook(lambda _, __, output: returned.append(output))
    short = calls_of(model, TEXTS[0])
    hook.remove()
    embedder = Calls(model, len(returned[0]) if isinstance(returned[0], tuple) else 0)
    kinds = kinds_of(model.get_submodule(layers))
    first = [kinds.index(kind) for kind in range(max(kinds) + 1)]
    return [describe_smaller(whole, embedder, index, TEXTS, short[index], enough) for index in first]


@pytest.mark.parametrize("model_type", [*TABLE, *OTHERS])
def test_a_smaller_copy_says_what_the_layer_says(model_type):
    model = wide(model_type)
    found = from_smaller_copies(model)
    if model_type in NO_COPY:
        assert found[1] is None
        return
    assert None not in found
    kinds = kinds_of(model.get_submodule(find_decoder(model, Path("toy"))[1]))
    real = described(model)
    assert list(lines(Topologies.of_kinds(found, kinds))) == list(lines(real))
    assert [(topology.migrations, topology.rotations) for topology in Topologies.of_kinds(found, kinds).kinds] == [
        (topology.migrations, topology.rotations) for topology in real.kinds
    ]
    assert all("smaller copy" in topology.found_on for topology in found)


def smaller(model: nn.Module, index: int = 0) -> tuple[nn.Module, nn.Module]:
    """A layer, and its first smaller copy."""
    layer = model.get_submodule(find_decoder(model, Path("toy"))[1])[index]
    config = next(smaller_configs(model.config, layer, index, 1))
    return layer, type(layer)(config, index)


def test_a_copy_is_smaller_and_alike():
    layer, copy = smaller(wide("qwen3"))
    assert weights_of_copy(copy) < weights_of_copy(layer) / 20
    assert likeness(copy) == likeness(layer)


@pytest.mark.parametrize("heads", [8, 4, 1])
def test_attention_keeps_its_kind(heads):
    """As many key-value heads as heads, fewer, or one."""
    _, copy = smaller(wide("llama", num_key_value_heads=heads))
    groups, q, k = copy.self_attn.num_key_value_groups, copy.self_attn.q_proj, copy.self_attn.k_proj
    assert (q.out_features == k.out_features) == (groups == 1) == (heads == 8)
    assert (k.out_features == copy.self_attn.head_dim) == (heads == 1)


def test_widths_that_are_equal_stay_equal_and_others_different():
    layer, copy = smaller(wide("llama", intermediate_size=256))
    assert layer.mlp.up_proj.out_features == 256 == layer.self_attn.o_proj.in_features
    assert copy.mlp.up_proj.out_features == copy.self_attn.o_proj.in_features == copy.hidden_size
    _, other = smaller(wide("llama"))
    assert other.mlp.up_proj.out_features != other.hidden_size


def test_a_small_layer_has_no_copy():
    assert from_smaller_copies(wide("llama"), enough=10_000_000) == [None]


def test_a_fold_that_stands_for_none_is_refused():
    model, other = wide("llama"), wide("llama", num_key_value_heads=8)
    real, small_one = (Sized(m.get_submodule("model.layers")[0], m.config) for m in (model, other))
    fold = Fold(
        consumer="self_attn.o_proj", producers=[Producer(name="self_attn.v_proj")], coupling="heads",
        num_heads=8, num_kv_heads=8,
    )  # fmt: skip
    with pytest.raises(RiaError, match=r"self_attn\.o_proj: a fold of a smaller copy .* stands for 0 folds"):
        transferred(Topology((), (fold,)), small_one, real, 256)


def test_what_only_the_layers_own_widths_do_is_seen(monkeypatch):
    """A layer that mixes channels if there are many: its copy has a fold, the layer has none."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner.cumsum(-1) if inner.shape[-1] > 300 else inner)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert from_smaller_copies(wide("llama")) == [None]
    (topology,) = described(wide("llama")).kinds
    assert [fold.consumer for fold in topology.folds] == ["self_attn.o_proj"]


@pytest.mark.parametrize("linear, kind", [("v_proj", "llama.LlamaAttention"), ("qkv_proj", "phi3.Phi3Attention")])
def test_heads_that_the_layers_own_widths_do_not_let_turn(linear, kind, monkeypatch):
    """Permutations do not mind what is halved."""
    family, _, name = kind.partition(".")
    attention = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
    made = attention.__init__

    def init(self, *arguments, **named):
        made(self, *arguments, **named)
        setattr(self, linear, Halved(getattr(self, linear), beyond=100))

    monkeypatch.setattr(attention, "__init__", init)
    (topology,) = from_smaller_copies(wide(family))
    assert topology.rotations == () and len(topology.folds) == 2 and "own widths" in topology.found_on
    monkeypatch.setattr(smaller_copy, "available", lambda device: 1000)
    (believed,) = from_smaller_copies(wide(family))
    assert believed.rotations == ("self_attn.o_proj",)


def test_without_memory_for_the_layers_own_widths_the_copy_is_believed(monkeypatch):
    monkeypatch.setattr(smaller_copy, "available", lambda device: 1000)
    (topology,) = from_smaller_copies(wide("llama"))
    assert topology.found_on == "a smaller copy" and len(topology.folds) == 2


def test_the_width_of_heads_is_kept_in_the_second_try():
    """What has to fit it, such as the sections of a rotary embedding, may be no width."""
    model = wide("qwen3")
    first, second, *_ = smaller_configs(model.config, model.get_submodule("model.layers")[0], 0, 1)
    assert first.head_dim < 32 == second.head_dim and second.hidden_size < 256

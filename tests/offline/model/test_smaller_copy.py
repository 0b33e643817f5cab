"""What a smaller copy of a layer says is what the layer itself says, and widths are found without a list of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decoders import calls_of, described, lines, small
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
LATENT_HEADS = {"num_key_value_heads": 8}
LIKE_HEADS = {"opt": LATENT_HEADS, "deepseek_v3": LATENT_HEADS}


class Calls(Embedder):
    """How an in-memory model calls its layers."""

    def __init__(self, model: nn.Module, tupled: int):
        self.model = SimpleNamespace(folder=Path("toy"), model=model, layer_prefix=lambda index: f"layers.{index}.")
        self.unusable, self.tupled = "toy", tupled


def wide(model_type: str, **changes) -> nn.Module:
    """A toy with larger widths."""
    known = small(model_type).config.to_dict()
    own = {name: value for name, value in WIDE.items() if known.get(name) is not None}
    return small(model_type, **own | LIKE_HEADS.get(model_type, {}) | changes)


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
    assert None not in found
    kinds = kinds_of(model.get_submodule(find_decoder(model, Path("toy"))[1]))
    assert list(lines(Topologies.of_kinds(found, kinds))) == list(lines(described(model)))
    assert all("smaller copy" in topology.found_on for topology in found)

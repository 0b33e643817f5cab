"""vLLM's own Mamba-2 mixer with a pruned input projection, rank by rank.

With one group for all heads, each rank holds its share of the gate, of x and of dt, and all of B and C.
"""

import pytest
import torch
from compressed_tensors_layers import INT, Checkpoint
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.mamba import mamba_mixer2

from ria_vllm.errors import RiaError
from ria_vllm.format import permutation, sparse24
from ria_vllm.format.formats import FLOAT, INT8, INTEGERS
from ria_vllm.format.schema import RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.layer_matching import match_layers

HIDDEN, INNER, STATE, HEADS = 128, 256, 16, 8
OUTPUTS = {"gate": INNER, "x": INNER, "B": STATE, "C": STATE, "dt": HEADS}
ROWS = sum(OUTPUTS.values())


def stored(weight_format=FLOAT):
    """The tensors of the projection, its plain matrix, its permutation."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, HIDDEN, generator=generator)
    mask = sparse24.mask_from_bitmask(sparse24.compress(weight)[1])
    weight, scales = weight_format.quantize(weight * mask, torch.float32)
    tensors = weight_format.encode(weight, mask, scales)
    p = torch.randperm(HIDDEN, generator=generator).int()
    return tensors, weight.double()[:, permutation.invert(p).long()], p.numpy()


def in_proj(p, weight_format=FLOAT):
    words = weight_format.quantization
    schema = RiaSchema(sparsity_config=SparsityConfig(), weights=words and WeightQuantization(**words))
    config = RiaConfig(schema)
    config.permutations = {"mixer.in_proj": p}
    return in_proj_of(config)


def in_proj_of(config):
    config.pruned = config.stored = {"mixer.in_proj"}
    model = torch.nn.Module()
    with set_current_vllm_config(VllmConfig()):
        model.mixer = mamba_mixer2.MambaMixer2(
            hidden_size=HIDDEN, ssm_state_size=STATE, conv_kernel_size=4, intermediate_size=INNER,
            use_conv_bias=True, use_bias=False, n_groups=1, num_heads=HEADS, head_dim=INNER // HEADS,
            quant_config=config, prefix="mixer",
        )  # fmt: skip
    match_layers(config, model)
    return model.mixer.in_proj


def load(layer, tensors):
    for part, tensor in tensors.items():
        getattr(layer, part).weight_loader(getattr(layer, part), tensor)
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(("size", "weight_format"), [(1, FLOAT), (2, INT8), (4, INTEGERS[4, 32])])
def test_one_group_on_several_ranks(ranks, size, weight_format):
    tensors, plain, p = stored(weight_format)
    x = torch.randn(3, HIDDEN)
    want = dict(zip(OUTPUTS, (x.double() @ plain.T).split(list(OUTPUTS.values()), -1)))
    for rank in range(size):
        ranks(rank, size)
        layer = in_proj(p, weight_format)
        load(layer, tensors)
        mine = [want[output] if output in "BC" else want[output].chunk(size, -1)[rank] for output in OUTPUTS]
        torch.testing.assert_close(layer(x)[0].double(), torch.cat(mine, -1), rtol=0, atol=1e-4)
        assert not hasattr(layer, "weight")


@pytest.mark.parametrize("change", [lambda t: t[:-1]])
@pytest.mark.parametrize("part", ["compressed", "bitmask"])
def test_another_shape_is_named(ranks, part, change):
    ranks(0, 2)
    tensors, _, p = stored()
    tensors[part] = change(tensors[part])
    with pytest.raises(RiaError, match=rf"mixer\.in_proj\.{part} is .*damaged"):
        load(in_proj(p), tensors)


@pytest.mark.parametrize(("dense", "strategy"), [(False, "tensor"), (True, "channel")])
def test_quantized_by_compressed_tensors(ranks, dense, strategy):
    """Mamba-2 gives its own loader to every parameter that is named like one of a dense layer or like its scales."""
    checkpoint = Checkpoint(weights=INT, strategy=strategy, dense=dense)
    tensors = checkpoint.tensors("mixer.in_proj", ROWS, HIDDEN)
    x = torch.randn(3, HIDDEN)
    want = dict(zip(OUTPUTS, (x.double() @ checkpoint.plain["mixer.in_proj"].T).split(list(OUTPUTS.values()), -1)))
    for rank in range(2):
        ranks(rank, 2)
        layer = in_proj_of(checkpoint.config())
        load(layer, tensors)
        mine = [want[output] if output in "BC" else want[output].chunk(2, -1)[rank] for output in OUTPUTS]
        torch.testing.assert_close(layer(x)[0].double(), torch.cat(mine, -1), rtol=0, atol=1e-4)

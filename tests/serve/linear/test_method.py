"""The linear method in vLLM's own layers, rank by rank, against a float64 product of what the weights stand for.

Ranks are played one after the other in this process: vLLM's layers ask for rank and world size by two functions.
"""

import numpy as np
import pytest
import torch
from stored import Stored
from torch.nn.functional import linear
from vllm.config import LoRAConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FORMATS, INTEGERS
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.linear import packing
from ria_vllm.serve.load.engine import EngineOptions

HEAD, HEADS, KV, HIDDEN, INNER = 32, 8, 2, 128, 256

pytestmark = pytest.mark.usefixtures("ranks")
# A fold into gate and up, which vLLM fuses.
FOLD = Fold(consumer="down", producers=[Producer(name="gate"), Producer(name="up")], coupling="elementwise")
GATE_UP = {"gate": 0, "up": 1}


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-5)  # float32 sums of up to 512 products


def gate_up(config, inner=INNER):
    return MergedColumnParallelLinear(HIDDEN, [inner] * 2, quant_config=config, prefix="gate_up", return_bias=False)


def down(config, inner=INNER):
    """A rank's part of the product, without the bias."""
    return RowParallelLinear(
        inner, HIDDEN, quant_config=config, prefix="down", return_bias=False, reduce_results=False, skip_bias_add=True
    )


def replicated(config, columns=HIDDEN, rows=64, **settings):
    return ReplicatedLinear(columns, rows, quant_config=config, prefix="fc", return_bias=False, **settings)


def feed_forward(weight_format=FLOAT, inner=INNER, permuted=True, rounded=False, pattern="2:4"):
    stored = Stored(weight_format=weight_format, rounded=rounded, pattern=pattern)
    shared = stored.permutation(HIDDEN) if permuted else None
    stored.add("gate", inner, HIDDEN, shared)
    stored.add("up", inner, HIDDEN, shared)
    stored.add("down", HIDDEN, inner, stored.permutation(inner) if permuted else None)
    return stored


@pytest.mark.parametrize(
    ("name", "size", "permuted", "backend"),
    [
        ("float", 1, "none", ""), ("float", 4, "shared", ""), ("float", 8, "shared", ""),
        ("int8", 2, "shared", ""), ("int4-g32", 1, "shared", "reference"), ("int4-g128", 2, "shared", ""),
        ("int8-g64", 2, "none", "reference"),
    ],
)  # fmt: skip
def test_qkv(ranks, monkeypatch, name, size, permuted, backend):
    """More ranks than key-value heads have copies of these."""
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
    stored = Stored(weight_format=FORMATS[name])
    p = stored.permutation(HIDDEN) if permuted == "shared" else None
    for part, heads in (("q", HEADS), ("k", KV), ("v", KV)):
        stored.add(part, heads * HEAD, HIDDEN, p)
    x = torch.randn(7, HIDDEN)
    want = {part: stored.apply(x, part).unflatten(-1, (-1, HEAD)) for part in "qkv"}
    for rank in range(size):
        ranks(rank, size)
        layer = QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV, quant_config=stored.config(), prefix="qkv", return_bias=False
        )
        stored.load(layer, {part: part for part in "qkv"})
        kv_here, first = max(1, KV // size), rank * KV // size
        expected = [want["q"].chunk(size, 1)[rank]] + [want[part][:, first : first + kv_here] for part in "kv"]
        close(layer(x), torch.cat(expected, 1).flatten(1))
        assert {name for name, _ in layer.named_parameters()}.isdisjoint({"compressed", "bitmask", "weight"})


@pytest.mark.parametrize(
    ("name", "size", "inner", "backend", "pattern"),
    [
        ("float", 1, 256, "", "2:4"), ("float", 4, 256, "", "2:4"), ("float", 2, 192, "", "2:4"),
        ("float", 4, 192, "", "2:4"), ("int4", 2, 256, "", "2:4"), ("int8-g64", 4, 256, "reference", "2:4"),
        ("int4-g32", 2, 192, "", "2:4"), ("int8", 2, 192, "reference", "2:4"), ("int8", 4, 192, "", "8:16"),
        ("int4-g32", 2, 192, "", "4:8"), ("float", 4, 192, "", "8:16"), ("float", 2, 256, "dense", "2:4"),
        ("int4-g32", 2, 192, "dense", "8:16"),
    ],
)  # fmt: skip
def test_feed_forward_folds_on_every_number_of_ranks(ranks, monkeypatch, name, size, inner, backend, pattern):
    """The rows of gate and up are permuted as down's columns are; a rank's columns of down keep their scales.

    With inner 192 on 2 or 4 ranks each holds 96 or 48 columns, which no kernel takes without padding.
    """
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend if backend != "dense" else "")
    monkeypatch.setenv("RIA_VLLM_DENSE", "1" if backend == "dense" else "")
    stored = feed_forward(FORMATS[name], inner, pattern=pattern)
    config = stored.config([FOLD])
    assert config.folding.folded == {"down"}
    x, total = torch.randn(5, HIDDEN), 0
    for rank in range(size):
        ranks(rank, size)
        gate, up = stored.load(gate_up(config, inner), GATE_UP)(x).chunk(2, -1)
        second = stored.load(down(config, inner), {"down": None})
        total = total + second(torch.tanh(gate) * up)
        assert second.ria_packed.input_permutation is None
        assert second.ria_packed.choice.kernel.name == (backend or "cpu")
    want = (torch.tanh(stored.apply(x, "gate")) * stored.apply(x, "up")).float()
    close(total + stored.bias["down"], stored.apply(want, "down"))


def test_two_linears_for_four_outputs(ranks):
    """Qwen3.5's linear attention: q, k and v are one tensor and the gate another. vLLM's layer has four outputs."""
    stored = Stored()
    shared = stored.permutation(HIDDEN)
    stored.add("qkv", 2 * 64 + INNER, HIDDEN, shared)
    stored.add("z", INNER, HIDDEN, shared)
    config = stored.config()
    config.packed_modules_mapping = {"qkvz": ["qkv", "z"]}
    x = torch.randn(5, HIDDEN)
    whole = [*stored.apply(x, "qkv").split([64, 64, INNER], -1), stored.apply(x, "z")]
    for rank in range(2):
        ranks(rank, 2)
        layer = MergedColumnParallelLinear(
            HIDDEN, [64, 64, INNER, INNER], quant_config=config, prefix="qkvz", return_bias=False
        )
        got = stored.load(layer, {"z": 3, "qkv": (0, 1, 2)})(x)
        close(got, torch.cat([output.chunk(2, -1)[rank] for output in whole], -1))


def test_keys_that_are_also_the_values(ranks):
    stored = Stored()
    shared = stored.permutation(HIDDEN)
    stored.add("q", HEADS * HEAD, HIDDEN, shared)
    stored.add("k", KV * HEAD, HIDDEN, shared)
    config = stored.config()
    layer = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV, quant_config=config, prefix="qkv", return_bias=False)
    for name, shard in (("q", "q"), ("k", "k"), ("k", "v")):
        for part in ("compressed", "bitmask"):
            getattr(layer, part).weight_loader(getattr(layer, part), stored.tensors[name][part], shard)
        layer.bias.weight_loader(layer.bias, stored.bias[name], shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, HIDDEN)
    close(layer(x), torch.cat([stored.apply(x, name) for name in ("q", "k", "k")], -1))


def fused_on_disk():
    """Gate and up as one linear, and a fold into its halves."""
    stored = Stored()
    stored.add("gate_up", 2 * INNER, HIDDEN, stored.permutation(HIDDEN))
    stored.add("down", HIDDEN, INNER, stored.permutation(INNER))
    halves = [Producer(name="gate_up", rows=(0, INNER)), Producer(name="gate_up", rows=(INNER, 2 * INNER))]
    return stored, stored.config([Fold(consumer="down", producers=halves, coupling="elementwise")])


def test_fused_on_disk_with_row_ranges(ranks):
    stored, config = fused_on_disk()
    x = torch.randn(5, HIDDEN)
    want = stored.apply(x, "gate_up").chunk(2, -1)
    p = torch.from_numpy(stored.permutations["down"]).long()
    for rank in range(2):
        ranks(rank, 2)
        got = stored.load(gate_up(config), {"gate_up": None})(x)
        close(got, torch.cat([half[:, p].chunk(2, -1)[rank] for half in want], -1))


def test_a_piece_of_a_fused_linear_cannot_be_permuted():
    """Which of the fused rows a piece holds is not known, so a fold cannot be applied to it."""
    stored, config = fused_on_disk()
    layer = gate_up(config)
    for part, tensor in (("compressed", stored.tensors["gate_up"]["compressed"]), ("bias", stored.bias["gate_up"])):
        parameter = getattr(layer, part)
        with pytest.raises(RiaError, match=rf"gate_up\.{part}"):
            parameter.weight_loader(parameter, tensor[:INNER], 0)


@pytest.mark.parametrize(
    ("name", "rounded", "size"), [("float", False, 2), ("int8", True, 1), ("int4-g32", False, 2), ("int4", True, 2)]
)
def test_latent_attention_asks_for_the_plain_weight(ranks, size, name, rounded):
    """vLLM multiplies by what it takes out of kv_b_proj: each head's 48 keys, and behind them its values."""
    stored = Stored(weight_format=FORMATS[name], rounded=rounded)
    stored.add("kv_b", HEADS * (48 + HEAD), HIDDEN, stored.permutation(HIDDEN))
    p = torch.cat([stored.permutation(HEAD) + HEAD * head for head in range(HEADS)])
    stored.add("o", HIDDEN, HEADS * HEAD, p)
    values = Producer(name="kv_b", rows=(48, 48 + HEAD), blocks=HEADS)
    rule = Fold(consumer="o", producers=[values], coupling="heads", num_heads=HEADS, num_kv_heads=HEADS)
    config = stored.config([rule])
    assert config.folding.folded == {"o"}
    want = stored.plain["kv_b"].clone().view(HEADS, 48 + HEAD, HIDDEN)
    for head, inner in enumerate(p.view(HEADS, HEAD).long() % HEAD):
        want[head, 48:] = want[head, 48 + inner]
    for rank in range(size):
        ranks(rank, size)
        layer = ColumnParallelLinear(HIDDEN, HEADS * (48 + HEAD), quant_config=config, prefix="kv_b")
        layer.quant_method.finish_creation(layer, None)
        stored.load(layer, {"kv_b": None})
        got = get_and_maybe_dequant_weights(layer, out_dtype=torch.float32)
        torch.testing.assert_close(got, want.chunk(size)[rank].flatten(0, 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [("float", 1, 1), ("float", 2, 8), ("float", 4, 2), ("float", 16, 8), ("int8", 2, 1), ("int4-g64", 4, 1)],
)
def test_permutation_that_no_fold_absorbs(ranks, monkeypatch, name, size, blocks):
    """A permutation within each rank's channels needs no all-gather. Any other needs one, on every rank."""
    stored = Stored(weight_format=FORMATS[name])
    width = INNER // blocks
    p = torch.cat([stored.permutation(width) + width * i for i in range(blocks)])
    stored.add("down", HIDDEN, INNER, p.int())
    x, gathered, total = torch.randn(5, INNER), [], 0
    monkeypatch.setattr(packing, "tensor_model_parallel_all_gather", lambda own: gathered.append(own) or x)
    for rank in range(size):
        ranks(rank, size)
        total = total + stored.load(down(stored.config()), {"down": None})(x.chunk(size, -1)[rank])
    close(total + stored.bias["down"], stored.apply(x, "down"))
    assert len(gathered) == (size if blocks % size else 0)


@pytest.mark.parametrize("weight_format", [FLOAT, *INTEGERS.values()], ids=lambda one: one.name)
def test_half_precision(weight_format):
    """Whichever kernel is fastest here. Inputs and results have 8 bits, and sums are float32."""
    stored = Stored(weight_format=weight_format)
    stored.add("fc", 96, 512, stored.permutation(512))
    layer = stored.load(replicated(stored.config(), 512, 96, params_dtype=torch.bfloat16), {"fc": None})
    x = torch.randn(9, 512).bfloat16()
    got = layer(x)
    assert got.dtype == torch.bfloat16
    # Weights may be widened to bfloat16: half a unit in the last place of each, and of the bias and the result.
    torch.testing.assert_close(got.double(), stored.apply(x, "fc"), rtol=2**-8, atol=2e-2)


@pytest.mark.parametrize("name", ["int8", "int4-g64"])
def test_inputs_are_rounded_if_the_checkpoint_says_so(ranks, monkeypatch, name):
    """Each rank rounds the channels that it has, so two ranks are at least as exact as one."""
    monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    stored = feed_forward(FORMATS[name], permuted=False, rounded=True)
    x = torch.randn(5, INNER)
    x[0, 5], x[1] = 12.0, 0
    for size in (1, 2):
        total = 0
        for rank in range(size):
            ranks(rank, size)
            layer = stored.load(down(stored.config()), {"down": None})
            assert str(layer.ria_packed.choice) == "reference with inputs rounded to int8"
            here = x.chunk(size, -1)[rank]
            total = total + layer(here)
            scale = here.abs().amax(-1, keepdim=True).double() / 127
            rounded = torch.where(scale > 0, (here / scale).round() * scale, 0)
            close(layer(here), linear(rounded, stored.plain["down"].chunk(size, -1)[rank].double()))
        off = (total + stored.bias["down"]).double() - stored.apply(x, "down")
        assert 1e-3 < off.norm() < 1


class Float(ReferenceKernel):
    """A kernel like those on GPUs."""

    name, is_fallback = "float", False

    @staticmethod
    def can_implement(config):
        return None if config.input_dtype is None and config.weight_format == FLOAT else "float only"


def test_unrounded_where_no_kernel_rounds(monkeypatch):
    monkeypatch.setattr(registry, "LINEAR_KERNELS", (Float,))
    stored = feed_forward(FORMATS["int8-g64"], rounded=True)
    x = torch.randn(3, HIDDEN)
    layer = stored.load(gate_up(stored.config([FOLD])), GATE_UP)
    how = "with int8-g64 widened to float32 and inputs not rounded to int8"
    assert str(layer.ria_packed.choice) == f"float {how}"
    p = torch.from_numpy(stored.permutations["down"]).long()
    close(layer(x), torch.cat([stored.apply(x, name)[:, p] for name in GATE_UP], -1))


def test_dense_linears_are_vllms_own():
    stored = Stored()
    stored.add("other", 64, HIDDEN)
    assert isinstance(replicated(stored.config(ignore=["fc"])).quant_method, UnquantizedLinearMethod)


@pytest.mark.parametrize("name", ["float", "int4-g32"])
def test_no_folds_with_lora(name):
    """vLLM adds the adapter's product to that of the layer, so channels have the model's own order."""
    stored = feed_forward(FORMATS[name])
    config = stored.config([FOLD])
    with set_current_vllm_config(VllmConfig()):
        get_current_vllm_config().lora_config = LoRAConfig(max_lora_rank=8)
        first, second = gate_up(config), down(config)
    x, y = torch.randn(3, HIDDEN), torch.randn(3, INNER)
    close(stored.load(first, GATE_UP)(x), torch.cat([stored.apply(x, "gate"), stored.apply(x, "up")], -1))
    folding = config.folding_under(EngineOptions(lora=True))
    assert np.array_equal(config.stored_linear("down", folding).input_permutation, stored.permutations["down"])
    close(stored.load(second, {"down": None})(y) + stored.bias["down"], stored.apply(y, "down"))

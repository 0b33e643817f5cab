"""Layers of vLLM with integer weights of every kind, rank by rank, against a float64 product of what they stand for."""

from types import SimpleNamespace

import pytest
import torch
from stored import Stored
from torch.nn.functional import linear
from vllm.config import LoadConfig, LoRAConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from ria_vllm.errors import RiaError
from ria_vllm.format import permutation
from ria_vllm.format.formats import FLOAT, FORMATS, INTEGERS
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.linear import packing

HEAD, HEADS, KV, HIDDEN, INNER = 32, 8, 2, 128, 512

pytestmark = pytest.mark.usefixtures("ranks")
EVERY = pytest.mark.parametrize("format", INTEGERS.values(), ids=lambda one: one.name)
BACKENDS = pytest.mark.parametrize("backend", ["", "reference"], ids=["", "reference"])
FOLD = Fold(consumer="down", producers=[Producer(name="gate"), Producer(name="up")], coupling="elementwise")


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-5)  # float32 sums of up to 512 products


def row_parallel(config, inner=INNER, **settings):
    return RowParallelLinear(
        inner, HIDDEN, quant_config=config, prefix="down", return_bias=False, reduce_results=False,
        skip_bias_add=True, **settings,
    )  # fmt: skip


def gate_up(config, inner=INNER):
    return MergedColumnParallelLinear(HIDDEN, [inner] * 2, quant_config=config, prefix="gate_up", return_bias=False)


def feed_forward(format, inner=INNER, orders=True, rounded=False):
    stored = Stored(weight_format=format, rounded=rounded)
    shared = stored.order(HIDDEN) if orders else None
    stored.add("gate", inner, HIDDEN, shared)
    stored.add("up", inner, HIDDEN, shared)
    stored.add("down", HIDDEN, inner, stored.order(inner) if orders else None)
    return stored


@EVERY
@BACKENDS
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("each", [False, True])
def test_qkv(ranks, monkeypatch, format, backend, size, each):
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
    stored = Stored(weight_format=format)
    shared = stored.order(HIDDEN)
    for name, heads in (("q", HEADS), ("k", KV), ("v", KV)):
        stored.add(name, heads * HEAD, HIDDEN, stored.order(HIDDEN) if each else shared)
    x = torch.randn(7, HIDDEN)
    want = {name: stored.apply(x, name) for name in "qkv"}
    for rank in range(size):
        ranks(rank, size)
        layer = QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV, quant_config=stored.config(), prefix="qkv", return_bias=False
        )
        stored.load(layer, {name: name for name in "qkv"})
        close(layer(x), torch.cat([want[name].chunk(size, 1)[rank] for name in "qkv"], 1))
        assert len(layer.ria_packed.calls) == (3 if each else 1)


@EVERY
@BACKENDS
@pytest.mark.parametrize("size", [1, 2, 4])
def test_feed_forward(ranks, monkeypatch, format, backend, size):
    """The rows of gate and up take the order of down's columns; a rank's columns of down keep their scales."""
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
    stored = feed_forward(format)
    config = stored.config([FOLD])
    assert config.folding.folded == {"down"}
    x, total = torch.randn(5, HIDDEN), 0
    for rank in range(size):
        ranks(rank, size)
        first, second = gate_up(config), row_parallel(config)
        gate, up = stored.load(first, {"gate": 0, "up": 1})(x).chunk(2, -1)
        total = total + stored.load(second, {"down": None})(torch.tanh(gate) * up)
    want = (torch.tanh(stored.apply(x, "gate")) * stored.apply(x, "up")).float()
    close(total + stored.bias["down"], stored.apply(want, "down"))


@BACKENDS
@pytest.mark.parametrize("name", ["int4-g32", "int8-g32", "int4", "int8"])
def test_a_rank_whose_columns_are_padded(ranks, monkeypatch, name, backend):
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
    stored = feed_forward(FORMATS[name], inner=192)
    x, total = torch.randn(5, 192), 0
    order = torch.from_numpy(stored.orders["down"]).long()
    for rank in range(2):
        ranks(rank, 2)
        layer = stored.load(row_parallel(stored.config([FOLD]), 192), {"down": None})
        assert layer.ria_packed.padding == 32
        total = total + layer(x[:, order].chunk(2, -1)[rank])
    close(total + stored.bias["down"], stored.apply(x, "down"))


@EVERY
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_permutation_that_crosses_ranks(ranks, monkeypatch, format, size):
    stored = feed_forward(format)
    x, total = torch.randn(5, INNER), 0
    monkeypatch.setattr(packing, "tensor_model_parallel_all_gather", lambda own: x)
    for rank in range(size):
        ranks(rank, size)
        layer = stored.load(row_parallel(stored.config()), {"down": None})
        assert (layer.ria_packed.input_channels is not None) == (size > 1)
        total = total + layer(x.chunk(size, -1)[rank])
    close(total + stored.bias["down"], stored.apply(x, "down"))


@pytest.mark.parametrize("name", ["int4-g64", "int8-g128"])
def test_a_cut_through_a_group_is_refused(ranks, name):
    format, inner = FORMATS[name], 3 * FORMATS[name].group_size
    stored = feed_forward(format, inner=inner)
    ranks(0, 2)
    words = (
        rf"down: {inner} input channels over 2 ranks leave {inner // 2} each.*a group of {format.group_size}.*{name}"
    )
    with pytest.raises(RiaError, match=words + ".*smaller --tensor-parallel-size, or a checkpoint with smaller groups"):
        row_parallel(stored.config(), inner)


@EVERY
def test_half_precision(ranks, format):
    """Whichever kernel is fastest here. Inputs and results have 8 bits, and sums are float32."""
    stored = Stored(weight_format=format)
    stored.add("fc", 96, INNER, stored.order(INNER))
    layer = ReplicatedLinear(
        INNER, 96, quant_config=stored.config(), prefix="fc", params_dtype=torch.bfloat16, return_bias=False
    )
    x = torch.randn(9, INNER).bfloat16()
    got, want = stored.load(layer, {"fc": None})(x), stored.apply(x, "fc")
    # Weights may be widened to bfloat16: half a unit in the last place of each, and of the bias and the result.
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2e-2)


@EVERY
def test_inputs_are_rounded_if_the_checkpoint_says_so(ranks, monkeypatch, format):
    """Each rank rounds the channels that it has, so two ranks are at least as exact as one."""
    monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    stored = feed_forward(format, orders=False, rounded=True)
    x = torch.randn(5, INNER)
    x[0, 5], x[1] = 12.0, 0
    for size in (1, 2):
        total = 0
        for rank in range(size):
            ranks(rank, size)
            layer = stored.load(row_parallel(stored.config()), {"down": None})
            assert str(layer.ria_packed.calls[0].choice) == "reference with inputs rounded to int8"
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


def test_unrounded_where_no_kernel_rounds(ranks, monkeypatch):
    monkeypatch.setattr(registry, "kernels", lambda: (Float,))
    stored = feed_forward(FORMATS["int8-g64"], rounded=True)
    config, x = stored.config([FOLD]), torch.randn(3, HIDDEN)
    layer = stored.load(gate_up(config), {"gate": 0, "up": 1})
    how = "with int8-g64 widened to float32 and inputs not rounded to int8"
    assert str(layer.ria_packed.calls[0].choice) == f"float {how}"
    order = torch.from_numpy(stored.orders["down"]).long()
    close(layer(x), torch.cat([stored.apply(x, name)[:, order] for name in ("gate", "up")], -1))


@EVERY
def test_no_folds_with_lora(ranks, format):
    """vLLM adds the adapter's product to that of the layer, so channels have the model's own order."""
    stored = feed_forward(format)
    config = stored.config([FOLD])
    with set_current_vllm_config(VllmConfig()):
        get_current_vllm_config().lora_config = LoRAConfig(max_lora_rank=8)
        first, second = gate_up(config), row_parallel(config)
    x, y = torch.randn(3, HIDDEN), torch.randn(3, INNER)
    close(stored.load(first, {"gate": 0, "up": 1})(x), torch.cat([stored.apply(x, "gate"), stored.apply(x, "up")], -1))
    close(stored.load(second, {"down": None})(y) + stored.bias["down"], stored.apply(y, "down"))


@EVERY
@BACKENDS
def test_a_reload(ranks, monkeypatch, format, backend):
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
    first, second = feed_forward(format), feed_forward(format)
    for name, parts in second.tensors.items():
        parts["weight_scale"] = 2 * parts["weight_scale"]
        second.plain[name] = 2 * second.plain[name]
    config = first.config()
    layer = gate_up(config)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    x, linears = torch.randn(3, HIDDEN), {"gate": 0, "up": 1}
    first.load(layer, linears)
    for stored in (second, first):
        initialize_layerwise_reload(model)
        for name, shard in linears.items():
            for part, tensor in (stored.tensors[name] | {"bias": stored.bias[name]}).items():
                getattr(layer, part).weight_loader(getattr(layer, part), tensor, shard)
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
        close(layer(x), torch.cat([stored.apply(x, name) for name in linears], -1))


@EVERY
def test_dummy_weights(ranks, format):
    stored = feed_forward(format)
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = gate_up(stored.config())
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                parameter.data.uniform_(-1e-3, 1e-3)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer(torch.randn(3, HIDDEN)).isfinite().all()


def damaged(change, format="int4-g64", dtype="float32"):
    stored = feed_forward(FORMATS[format])
    change(stored.tensors["down"])
    config = stored.config()
    config.schema.weights.dtype = dtype
    stored.load(row_parallel(config), {"down": None})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("weight_scale"), r"down\.weight_scale is in none of the weight files"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:, ::2]), r"down\.weight_scale is .* \(128, 4\), but .*8\)"),
        (lambda t: t.update(weight_scale=t["weight_scale"].double()), r"is torch.float64 .*needs torch.bfloat16 or "),
        (lambda t: t["weight_scale"].__setitem__((3, 1), float("nan")), "down: a weight_scale is not a finite number"),
        (lambda t: t.update(compressed=t["compressed"].view(torch.int8)), r"down\.compressed is torch.int8"),
    ],
)
def test_damaged_tensors_are_refused(ranks, change, words):
    with pytest.raises(RiaError, match=words):
        damaged(change)


def test_scales_are_not_rounded_when_they_are_loaded(ranks):
    """Served in another dtype than the model's own."""
    stored = Stored(weight_format=FORMATS["int4-g32"])
    stored.add("fc", 64, HIDDEN)
    stored.tensors["fc"]["weight_scale"] *= 1e-6  # subnormal in float16
    config = stored.config()
    config.schema.weights.dtype = "float16"
    layer = ReplicatedLinear(HIDDEN, 64, quant_config=config, prefix="fc", params_dtype=torch.float16)
    layer.weight_scale.weight_loader(layer.weight_scale, stored.tensors["fc"]["weight_scale"])
    assert torch.equal(layer.weight_scale, stored.tensors["fc"]["weight_scale"].float())


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float32", "float32"), ("float16", "bfloat16")], ids=str)
@BACKENDS
def test_scales_of_groups_keep_the_dtype_of_the_checkpoint(ranks, monkeypatch, backend, dtypes):
    """`compress` writes bfloat16, and other writers what they like. A fused layer may get two of them."""
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
    stored = feed_forward(FORMATS["int4-g64"])
    for name, dtype in zip(("gate", "up"), dtypes):
        parts, order = stored.tensors[name], stored.orders.get(name)
        # More digits than bfloat16 has: a reader that rounds them is off by far more than `close` allows.
        parts["weight_scale"] = (parts["weight_scale"].float() * 1.0013).to(getattr(torch, dtype))
        plain = stored.weight_format.decode(parts, torch.float32)
        inverse = slice(None) if order is None else permutation.invert(torch.from_numpy(order)).long()
        stored.plain[name] = plain[:, inverse]
    layer = stored.load(gate_up(stored.config()), {"gate": 0, "up": 1})
    x = torch.randn(3, HIDDEN)
    close(layer(x), torch.cat([stored.apply(x, "gate"), stored.apply(x, "up")], -1))

"""The linear method in vLLM's own layers, rank by rank, against a float64 product of the model's plain weights.

Ranks are played one after the other in this process: vLLM's layers ask for rank and world size by two functions.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored import Stored
from torch.utils._python_dispatch import TorchDispatchMode
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
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FORMATS, INTEGERS
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.serve.linear import packing
from ria_vllm.serve.load.engine import EngineOptions

HEAD, HEADS, KV, HIDDEN, INNER = 32, 8, 2, 128, 256


pytestmark = pytest.mark.usefixtures("engine")


def close(got, want):
    torch.testing.assert_close(
        got.double(), want, rtol=0, atol=2e-5
    )  # float32 sums of up to 256 products, results of about 1


QKV = {"q": "q", "k": "k", "v": "v"}


def attention(stored, config):
    return stored.load(
        QKVParallelLinear(HIDDEN, HEAD, HEADS, KV, quant_config=config, prefix="qkv", return_bias=False), QKV
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("orders", ["none", "shared", "each"])
def test_qkv(ranks, size, orders):
    stored = Stored()
    shared = stored.order(HIDDEN)
    for name, heads in (("q", HEADS), ("k", KV), ("v", KV)):
        order = {"none": None, "shared": shared, "each": stored.order(HIDDEN)}[orders]
        stored.add(name, heads * HEAD, HIDDEN, order)
    x = torch.randn(7, HIDDEN)
    want = {name: stored.apply(x, name).unflatten(-1, (-1, HEAD)) for name in QKV}
    for rank in range(size):
        ranks(rank, size)
        layer = attention(stored, stored.config())
        kv_here, first = max(1, KV // size), rank * KV // size
        expected = [want["q"].chunk(size, 1)[rank]] + [want[n][:, first : first + kv_here] for n in ("k", "v")]
        close(layer(x), torch.cat(expected, 1).flatten(1))
        assert len(layer.ria_packed.calls) == (3 if orders == "each" else 1)
        assert {name for name, _ in layer.named_parameters()}.isdisjoint({"compressed", "bitmask", "weight"})


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("inner", [INNER, 192])
def test_feed_forward_folds_on_every_number_of_ranks(ranks, size, inner):
    """With inner 192 on 2 or 4 ranks each holds 96 or 48 columns, which no kernel takes without padding."""
    stored = Stored()
    shared = stored.order(HIDDEN)
    stored.add("gate", inner, HIDDEN, shared)
    stored.add("up", inner, HIDDEN, shared)
    stored.add("down", HIDDEN, inner, stored.order(inner))
    rule = Fold(consumer="down", producers=[Producer(name="gate"), Producer(name="up")], coupling="elementwise")
    config = stored.config([rule])
    assert config.folding.folded == {"down"}
    x = torch.randn(5, HIDDEN)
    total = 0
    for rank in range(size):
        ranks(rank, size)
        first = MergedColumnParallelLinear(
            HIDDEN, [inner, inner], quant_config=config, prefix="gate_up", return_bias=False
        )
        second = RowParallelLinear(
            inner,
            HIDDEN,
            quant_config=config,
            prefix="down",
            return_bias=False,
            reduce_results=False,
            skip_bias_add=True,
        )
        gate, up = stored.load(first, {"gate": 0, "up": 1})(x).chunk(2, -1)
        total = total + stored.load(second, {"down": None})(torch.tanh(gate) * up)
        assert second.ria_packed.calls[0].input_permutation is None
    want = (torch.tanh(stored.apply(x, "gate")) * stored.apply(x, "up")).float()
    close(total + stored.bias["down"], stored.apply(want, "down"))


class LargestCopy(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation makes and that is not a view."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not (function.is_view or function.overloadpacket.__name__.endswith("_")):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("reordered", [False, True])
def test_a_rank_copies_no_more_than_its_rows(ranks, size, reordered):
    stored = Stored()
    for name in ("gate", "up"):
        stored.add(name, INNER, HIDDEN)
    stored.add("down", HIDDEN, INNER, stored.order(INNER))
    rule = Fold(consumer="down", producers=[Producer(name="gate"), Producer(name="up")], coupling="elementwise")
    config = stored.config([rule] if reordered else [])
    for rank in range(size):
        ranks(rank, size)
        layer = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], quant_config=config, prefix="gate_up")
        for shard, name in enumerate(("gate", "up")):
            for part in ("compressed", "bitmask"):
                tensor, parameter = stored.tensors[name][part], getattr(layer, part)
                with LargestCopy() as copies:
                    parameter.weight_loader(parameter, tensor, shard)
                rows = stored.orders["down"] if reordered else np.arange(INNER)
                mine = torch.from_numpy(rows).long().chunk(size)[rank]
                assert torch.equal(parameter.data.chunk(2)[shard], tensor[mine])
                assert copies.elements <= max(tensor.numel() // size, INNER)  # at most the order itself
                assert reordered == bool(copies.elements)


def own_memory() -> int:
    """Bytes of memory that this process holds, not counting mapped files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


def test_rows_of_other_ranks_stay_in_the_file(ranks, tmp_path):
    """Through vLLM's own reader of safetensors; each of four ranks has a quarter of the rows."""
    rows, columns, size = 1 << 14, 1 << 13, 4
    one = torch.zeros(rows, columns // 2, dtype=torch.bfloat16)
    save_file({"up.compressed": one}, tmp_path / "model.safetensors")
    whole = one.nbytes
    del one
    stored = Stored()
    stored.add("down", 8, rows, stored.order(rows))
    stored.tensors["up"] = {}
    rule = Fold(consumer="down", producers=[Producer(name="up")], coupling="elementwise")
    config = stored.config([rule])
    ranks(1, size)
    layer = ColumnParallelLinear(columns, rows, quant_config=config, prefix="up", params_dtype=torch.bfloat16)
    layer.compressed.data.fill_(1)  # so that its pages are allocated before the measurement
    before = own_memory()
    ((_, tensor),) = safetensors_weights_iterator([str(tmp_path / "model.safetensors")], use_tqdm_on_load=False)
    layer.compressed.weight_loader(layer.compressed, tensor)
    assert own_memory() - before < 0.3 * whole
    assert not layer.compressed.any()


def test_two_linears_for_four_outputs(ranks):
    """Qwen3.5's linear attention: q, k and v are one tensor and the gate another. vLLM's layer has four outputs."""
    stored = Stored()
    shared = stored.order(HIDDEN)
    stored.add("qkv", 2 * 64 + INNER, HIDDEN, shared)
    stored.add("z", INNER, HIDDEN, shared)
    config = stored.config()
    config.packed_modules_mapping = {"qkvz": ["qkv", "z"]}
    x = torch.randn(5, HIDDEN)
    for size in (1, 2):
        for rank in range(size):
            ranks(rank, size)
            layer = MergedColumnParallelLinear(
                HIDDEN, [64, 64, INNER, INNER], quant_config=config, prefix="qkvz", return_bias=False
            )
            got = stored.load(layer, {"z": 3, "qkv": (0, 1, 2)})(x)
            whole = [*stored.apply(x, "qkv").split([64, 64, INNER], -1), stored.apply(x, "z")]
            close(got, torch.cat([output.chunk(size, -1)[rank] for output in whole], -1))


def test_fused_on_disk_though_vllm_names_two_linears(ranks):
    """GLM-4's gate_up_proj, in a folder whose tensor names are not known beforehand."""
    stored = Stored()
    stored.add("gate_up", 2 * INNER, HIDDEN, stored.order(HIDDEN))
    config = stored.config()
    config.permutations = dict.fromkeys(("gate", "up"), stored.orders["gate_up"])
    config.pruned, config.stored, config.names = {"gate", "up"}, None, {}
    layer = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], quant_config=config, prefix="gate_up", return_bias=False)
    x = torch.randn(5, HIDDEN)
    close(stored.load(layer, {"gate_up": None})(x), stored.apply(x, "gate_up"))


def test_keys_that_are_also_the_values(ranks):
    stored = Stored()
    shared = stored.order(HIDDEN)
    stored.add("q", HEADS * HEAD, HIDDEN, shared)
    stored.add("k", KV * HEAD, HIDDEN, shared)
    config = stored.config()
    layer = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV, quant_config=config, prefix="qkv", return_bias=False)
    for name, shard in (("q", "q"), ("k", "k"), ("k", "v")):
        for part, tensor in stored.tensors[name].items():
            getattr(layer, part).weight_loader(getattr(layer, part), tensor, shard)
        layer.bias.weight_loader(layer.bias, stored.bias[name], shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, HIDDEN)
    close(layer(x), torch.cat([stored.apply(x, name) for name in ("q", "k", "k")], -1))


def test_fused_on_disk_with_row_ranges(ranks):
    stored = Stored()
    stored.add("gate_up", 2 * INNER, HIDDEN, stored.order(HIDDEN))
    stored.add("down", HIDDEN, INNER, stored.order(INNER))
    halves = [Producer(name="gate_up", rows=(0, INNER)), Producer(name="gate_up", rows=(INNER, 2 * INNER))]
    config = stored.config([Fold(consumer="down", producers=halves, coupling="elementwise")])
    x = torch.randn(5, HIDDEN)
    want = stored.apply(x, "gate_up").chunk(2, -1)
    order = torch.from_numpy(stored.orders["down"]).long()
    for rank in range(2):
        ranks(rank, 2)
        layer = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], quant_config=config, prefix="gate_up", return_bias=False
        )
        got = stored.load(layer, {"gate_up": None})(x)
        close(got, torch.cat([half[:, order].chunk(2, -1)[rank] for half in want], -1))


@pytest.mark.parametrize(
    ("name", "rounded"),
    [("float", False), *((one.name, rounded) for one in INTEGERS.values() for rounded in (False, True))],
)
@pytest.mark.parametrize("size", [1, 2])
def test_latent_attention_asks_for_the_plain_weight(ranks, size, name, rounded):
    """vLLM multiplies by what it takes out of kv_b_proj: each head's 48 keys, and behind them its values."""
    stored = Stored(weight_format=FORMATS[name], rounded=rounded)
    stored.add("kv_b", HEADS * (48 + HEAD), HIDDEN, stored.order(HIDDEN))
    order = torch.cat([stored.order(HEAD) + HEAD * head for head in range(HEADS)])
    stored.add("o", HIDDEN, HEADS * HEAD, order)
    values = Producer(name="kv_b", rows=(48, 48 + HEAD), blocks=HEADS)
    rule = Fold(consumer="o", producers=[values], coupling="heads", num_heads=HEADS, num_kv_heads=HEADS)
    config = stored.config([rule])
    assert config.folding.folded == {"o"}
    want = stored.plain["kv_b"].clone().view(HEADS, 48 + HEAD, HIDDEN)
    for head, inner in enumerate(order.view(HEADS, HEAD).long() % HEAD):
        want[head, 48:] = want[head, 48 + inner]
    for rank in range(size):
        ranks(rank, size)
        layer = ColumnParallelLinear(HIDDEN, HEADS * (48 + HEAD), quant_config=config, prefix="kv_b")
        layer.quant_method.finish_creation(layer, None)
        stored.load(layer, {"kv_b": None})
        got = get_and_maybe_dequant_weights(layer, out_dtype=torch.float32)
        torch.testing.assert_close(got, want.chunk(size)[rank].flatten(0, 1), rtol=1e-6, atol=1e-7)


def test_a_piece_of_a_fused_linear_cannot_be_reordered(ranks):
    """Which of the fused rows a piece holds is not known, so a fold cannot be applied to it."""
    stored = Stored()
    stored.add("gate_up", 2 * INNER, HIDDEN)
    stored.add("down", HIDDEN, INNER, stored.order(INNER))
    halves = [Producer(name="gate_up", rows=(0, INNER)), Producer(name="gate_up", rows=(INNER, 2 * INNER))]
    config = stored.config([Fold(consumer="down", producers=halves, coupling="elementwise")])
    layer = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], quant_config=config, prefix="gate_up")
    for part, tensor in (("compressed", stored.tensors["gate_up"]["compressed"]), ("bias", stored.bias["gate_up"])):
        parameter = getattr(layer, part)
        with pytest.raises(RiaError, match=rf"gate_up\.{part}: vLLM fuses or splits it .*cannot be reordered"):
            parameter.weight_loader(parameter, tensor[:INNER], 0)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_permutation_that_no_fold_absorbs(ranks, monkeypatch, size, blocks):
    """A permutation within each rank's channels needs no all-gather. Any other needs one, on every rank."""
    stored = Stored()
    width = INNER // blocks
    order = torch.cat([stored.order(width) + width * i for i in range(blocks)])
    stored.add("down", HIDDEN, INNER, order.int())
    x = torch.randn(5, INNER)
    gathered = []
    monkeypatch.setattr(packing, "tensor_model_parallel_all_gather", lambda own: gathered.append(own) or x)
    total = 0
    for rank in range(size):
        ranks(rank, size)
        layer = RowParallelLinear(
            INNER, HIDDEN, quant_config=stored.config(), prefix="down", reduce_results=False, skip_bias_add=True,
            return_bias=False,
        )  # fmt: skip
        total = total + stored.load(layer, {"down": None})(x.chunk(size, -1)[rank])
    close(total + stored.bias["down"], stored.apply(x, "down"))
    assert len(gathered) == (size if blocks % size else 0)


@pytest.mark.parametrize("layer_class", [ColumnParallelLinear, ReplicatedLinear])
def test_plain_layers(ranks, layer_class):
    stored = Stored()
    stored.add("fc", 96, HIDDEN, stored.order(HIDDEN))
    layer = layer_class(HIDDEN, 96, quant_config=stored.config(), prefix="fc", return_bias=False)
    x = torch.randn(2, 3, HIDDEN)
    close(stored.load(layer, {"fc": None})(x), stored.apply(x, "fc"))


def test_values_are_cast_to_the_dtype_that_is_served(ranks):
    stored = Stored()
    stored.add("fc", 64, HIDDEN)
    layer = ReplicatedLinear(
        HIDDEN, 64, quant_config=stored.config(), prefix="fc", params_dtype=torch.bfloat16, return_bias=False
    )
    x = torch.randn(4, HIDDEN).bfloat16()
    got = stored.load(layer, {"fc": None})(x)
    assert got.dtype == torch.bfloat16
    stored.plain["fc"] = stored.plain["fc"].bfloat16()
    # the bias is rounded to bf16 and so is the result: half a unit in the last place each, for values below 8
    torch.testing.assert_close(got.double(), stored.apply(x, "fc"), rtol=0, atol=2 * 2**-6)


def test_dense_linears_are_vllms_own(ranks):
    stored = Stored()
    stored.add("other", 64, HIDDEN)
    layer = ReplicatedLinear(HIDDEN, 64, quant_config=stored.config(ignore=["fc"]), prefix="fc")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_no_folds_with_lora(ranks):
    """Adapters count channels in the model's own order."""
    stored = Stored()
    for name in ("gate", "up"):
        stored.add(name, INNER, HIDDEN)
    stored.add("down", HIDDEN, INNER, stored.order(INNER))
    rule = Fold(consumer="down", producers=[Producer(name="gate"), Producer(name="up")], coupling="elementwise")
    config = stored.config([rule])
    with set_current_vllm_config(VllmConfig()):
        get_current_vllm_config().lora_config = LoRAConfig(max_lora_rank=8)
        up = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], quant_config=config, prefix="gate_up", return_bias=False
        )
        down = RowParallelLinear(INNER, HIDDEN, quant_config=config, prefix="down", return_bias=False)
    x, y = torch.randn(3, HIDDEN), torch.randn(3, INNER)
    close(stored.load(up, {"gate": 0, "up": 1})(x), torch.cat([stored.apply(x, "gate"), stored.apply(x, "up")], -1))
    folding = config.folding_under(EngineOptions(lora=True))
    assert np.array_equal(config.stored_linear("down", folding).input_permutation, stored.orders["down"])
    close(stored.load(down, {"down": None})(y), stored.apply(y, "down"))


def test_compile_cache_is_keyed_by_the_kernels(ranks, monkeypatch):
    """A graph that was traced with one kernel must not be reused when another one serves the same folder."""
    keys = []
    for backend in ("cpu", "reference", "cpu"):
        monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
        with set_current_vllm_config(VllmConfig()):
            stored = Stored()
            stored.add("fc", 64, HIDDEN)
            stored.load(ReplicatedLinear(HIDDEN, 64, quant_config=stored.config(), prefix="fc"), {"fc": None})
            keys.append(get_current_vllm_config().compute_hash())
    assert keys[0] == keys[2] != keys[1]

"""Pruned experts in one of vLLM's mixture layers, with fixed routing, against a float64 product of their plain weights.

Without a kernel, vLLM's own experts compute. With one, the layer must hand it what the interface promises; the one here
decompresses what it gets.
"""

import functools
from types import SimpleNamespace

import mixture_layers
import pytest
import torch
from mixture_layers import EXPERTS, HIDDEN, INNER, LAYER, Model, StoredMixture, attached, play_rank, route, run, served
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from ria_vllm.errors import RiaError
from ria_vllm.formats import FORMATS, WRITTEN
from ria_vllm.serve.experts_dense import DenseExpertsMethod
from ria_vllm.serve.kernels import experts_registry
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel

pytestmark = pytest.mark.usefixtures("ranks")


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
        return None if config.weight_format.name in cls.formats else "format"

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
def path(request, monkeypatch):
    """Who computes: vLLM's own experts, the kernel above, or one of ours."""
    kernels = {"vllm": (ReferenceExpertsKernel,), "torch": (DecompressingKernel,)}
    monkeypatch.setattr(experts_registry, "KERNELS", kernels.get(request.param, experts_registry.KERNELS))
    if request.param == "reference":
        monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    return request.param


def close(got, want):
    assert want.std() > 0.3
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)  # float32 sums of up to 128 products


@pytest.mark.parametrize("weight_format", WRITTEN)
@pytest.mark.parametrize("orders", ["none", "shared", "linear"])
def test_every_format_and_order(path, orders, weight_format):
    """If each linear has its own order, no kernel serves it, and the dense weights need none."""
    stored = StoredMixture(orders, FORMATS[weight_format])
    model = served(stored)
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))
    packed = model.experts.ria_experts
    assert (packed is not None) == (path != "vllm" and orders != "linear")
    if packed is not None:
        assert (packed.input_permutation is not None) == (orders == "shared")
    names = {name for name, _ in model.experts.named_parameters()}
    assert not any("bitmask" in name or "compressed" in name for name in names)


def test_widened_weights(monkeypatch):
    monkeypatch.setattr(experts_registry, "KERNELS", (DecompressingKernel,))
    monkeypatch.setattr(DecompressingKernel, "formats", ("float",))
    stored = StoredMixture(weight_format=FORMATS["int8"])
    model = served(stored)
    assert "int8 widened" in str(model.experts.ria_experts.choice)
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_tensor_parallel(path, monkeypatch, size, folds):
    """Rows of gate and up are cut after they were put into the order of down's columns, with a fold and without."""
    stored = StoredMixture(bias=True, folds=folds)
    assert bool(stored.config().folding.folded) == folds
    x, weights, ids = route()
    total = 0
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        model = served(stored, tp_size=size, activation="swigluoai", has_bias=True)
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids, mixture_layers.swigluoai))


def test_ranks_with_few_channels(path, monkeypatch):
    """Each holds 8, which no kernel takes without padding."""
    stored = StoredMixture()
    x, weights, ids = route()
    total = 0
    for rank in range(16):
        play_rank(monkeypatch, rank, 16)
        total = total + run(served(stored, tp_size=16), x, weights, ids)
    close(total, stored.expected(x, weights, ids))


def test_a_rank_with_part_of_a_byte_is_refused(monkeypatch):
    play_rank(monkeypatch, 0, 32)
    with pytest.raises(RiaError, match="128 channels over 32 ranks leave 4 each.*Use a smaller"):
        Model(StoredMixture().config(), tp_size=32)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_expert_parallel(path, monkeypatch, size, placement):
    stored = StoredMixture(bias=True)
    x, weights, ids = route()
    total = 0
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    current.parallel_config.expert_placement_strategy = placement
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        with set_current_vllm_config(current):
            model = served(stored, tp_size=size, activation="swigluoai", has_bias=True)
        assert model.experts.local_num_experts == EXPERTS // size
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids, mixture_layers.swigluoai))


def test_router_weights_on_the_input(path, monkeypatch):
    monkeypatch.setattr(mixture_layers, "TOP", 1)
    stored = StoredMixture()
    model = served(stored, apply_router_weight_on_input=True, top_k=1)
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids, on_input=True))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations(path, activation):
    if path == "torch" and activation != "silu":
        pytest.skip("it knows no other")
    function = {
        "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    }[activation]  # fmt: skip
    stored = StoredMixture()
    model = served(stored, activation=activation)
    x, weights, ids = route()
    want = stored.expected(3 * x, weights, ids, lambda gate, up: function(gate) * up)
    torch.testing.assert_close(run(model, 3 * x, weights, ids).double(), want, rtol=0, atol=2e-4)  # results of about 10


def test_experts_that_vllm_does_not_have(monkeypatch):
    """Its experts for CPUs need 32 channels of gpt-oss's activation on each rank."""
    monkeypatch.setattr(experts_registry, "KERNELS", (ReferenceExpertsKernel,))
    stored = StoredMixture()
    x, weights, ids = route()
    total = 0
    for rank in range(8):
        play_rank(monkeypatch, rank, 8)
        model = served(stored, tp_size=8, activation="swigluoai")
        assert model.experts.ria_experts.choice.kernel is ReferenceExpertsKernel
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids, mixture_layers.swigluoai))


def test_a_forced_kernel_of_linears(monkeypatch):
    """It says nothing about experts."""
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cutlass")
    stored = StoredMixture()
    model = served(stored)
    assert str(model.experts.ria_experts.choice) == "cpu"
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))


def test_a_forced_kernel_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cpuu")
    with pytest.raises(RiaError, match="RIA_VLLM_BACKEND=cpuu is not a kernel"):
        Model(StoredMixture().config())


def test_a_limit_of_the_gate(path):
    """vLLM's experts for CPUs do not clamp, and so serve none that have a limit."""
    stored = StoredMixture()
    model = served(stored, swiglu_limit=0.7)
    assert model.experts.ria_experts is not None
    x, weights, ids = route()

    def act(gate, up):
        return mixture_layers.silu(gate.clamp(max=0.7), up.clamp(-0.7, 0.7))

    torch.testing.assert_close(
        run(model, x, weights, ids).double(), stored.expected(x, weights, ids, act), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("prefix", ["layers.1.mlp.experts", "wrong", ""])
def test_the_layer_is_found_by_its_path(path, prefix):
    stored = StoredMixture()
    config = stored.config()
    model = attached(config, Model(config, prefix=prefix))
    model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    assert config.report.expected == config.report.loaded == 1
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))


def test_experts_without_a_layer():
    config = StoredMixture().config()
    model = Model(config)
    model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(RiaError, match=f"experts {LAYER} would not be served.*no layer.*ria-vllm export"):
        attached(config, model)


def test_experts_of_another_pipeline_stage():
    from vllm.model_executor.models.utils import PPMissingLayer

    stored = StoredMixture()
    config = stored.config()
    model = Model(config)
    model.layers[1] = PPMissingLayer()
    attached(config, model)
    assert not model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())


def dense_beside_pruned(config, **settings):
    """A model whose only mixture layer has dense experts, though its prefix is that of pruned ones."""
    model = Model(config, **settings)
    model.layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity(), model.layers[1]])
    config.model_built = True
    return attached(config, model).layers[2].mlp.experts.routed_experts


def test_dense_experts_stay_with_vllm():
    config = StoredMixture().config()
    experts = dense_beside_pruned(config)
    assert type(experts.quant_method) is DenseExpertsMethod
    assert {"w13_weight", "w2_weight"} == set(experts._parameters)
    assert config.report.expected == 0


def test_dense_experts_beside_pruned_ones_on_ranks_of_expert_parallel(monkeypatch):
    """vLLM's own experts for CPUs would take an expert's global number for the one on this rank."""
    stored = StoredMixture()
    x, weights, ids = route()
    total = 0
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    for rank in range(2):
        play_rank(monkeypatch, rank, 2)
        with set_current_vllm_config(current):
            experts = dense_beside_pruned(stored.config(), tp_size=2)
        for here, e in enumerate(range(2 * rank, 2 * rank + 2)):
            gate, up, down = (stored.plain[f"{LAYER}.{e}.{end}"] for end in mixture_layers.KINDS.values())
            experts.w13_weight.data[here], experts.w2_weight.data[here] = torch.cat([gate, up]).float(), down.float()
        experts.quant_method.process_weights_after_loading(experts)
        copies = [tensor.clone() for tensor in (x, weights, ids)]
        total = total + experts.quant_method.apply(experts, *copies, None, None)
    close(total, stored.expected(x, weights, ids))


def test_dense_experts_beside_pruned_ones_that_vllm_gets_wrong():
    with pytest.raises(RiaError, match="layers.1.mlp.experts.*are dense, .* ignore swiglu_limit"):
        dense_beside_pruned(StoredMixture().config(), swiglu_limit=0.7)


def test_a_reload(path):
    first, second = StoredMixture(bias=True), StoredMixture(bias=True)
    for name, tensor in second.tensors.items():
        if name.endswith("compressed"):
            tensor.mul_(-1.5)
    second.plain = {name: -1.5 * plain for name, plain in second.plain.items()}
    config = first.config()
    model = attached(config, Model(config, activation="swigluoai", has_bias=True))
    record_metadata_for_reloading(model)
    model.load_weights((name, tensor.clone()) for name, tensor in first.tensors.items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    x, weights, ids = route()
    act = mixture_layers.swigluoai
    for stored in (second, first):
        initialize_layerwise_reload(model)
        model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
        close(run(model, x, weights, ids), stored.expected(x, weights, ids, act))
    assert config.report.loaded == 1
    missing = f"{LAYER}.2.up_proj.bitmask"
    initialize_layerwise_reload(model)
    model.load_weights((name, tensor.clone()) for name, tensor in first.tensors.items() if name != missing)
    with pytest.raises(RiaError, match=f"{missing} is in none of the weight files"):
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def test_a_reload_of_one_rank_of_expert_parallel(path, monkeypatch):
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    stored = StoredMixture()
    x, weights, ids = route()
    total = 0
    for rank in range(2):
        play_rank(monkeypatch, rank, 2)
        with set_current_vllm_config(current):
            config = stored.config()
            model = attached(config, Model(config, tp_size=2))
            record_metadata_for_reloading(model)
            zeros = {n: t.clone() if n.endswith("bitmask") else torch.zeros_like(t) for n, t in stored.tensors.items()}
            model.load_weights(iter(zeros.items()))
            model.experts.quant_method.process_weights_after_loading(model.experts)
            assert not run(model, x, weights, ids).any()
            initialize_layerwise_reload(model)
            model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
            finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids))


def test_weights_that_arrive_outside_a_load():
    stored = StoredMixture()
    model = served(stored)
    with pytest.raises(RiaError, match="when its layer has its weights already"):
        model.load_weights(iter(stored.tensors.items()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{LAYER}.3.down_proj.bitmask"), "3.down_proj.bitmask is in none of the weight files"),
        (lambda t: t.update({f"{LAYER}.0.up_proj.bitmask": torch.zeros(INNER, 4, dtype=torch.uint8)}), "needs"),
        (lambda t: t.update({f"{LAYER}.0.up_proj.compressed": torch.zeros(INNER, 32, dtype=torch.int8)}), "int8"),
        (lambda t: t[f"{LAYER}.1.gate_proj.bitmask"].fill_(255), "gate_up: .*damaged"),
        (lambda t: t.update({f"{LAYER}.1.gate_proj.zero": torch.zeros(2)}), "1.gate_proj.zero: .* no place"),
        (lambda t: t.update({f"{LAYER}.1.gate_proj.bias": torch.zeros(INNER)}), "1.gate_proj.bias: .* no place"),
    ],
)
def test_damaged_tensors(change, message):
    stored = StoredMixture()
    config = stored.config()
    change(stored.tensors)
    model = attached(config, Model(config))
    with pytest.raises(RiaError, match=message):
        model.load_weights(iter(stored.tensors.items()))
        model.experts.quant_method.process_weights_after_loading(model.experts)


def test_biases_of_the_wrong_shape():
    stored = StoredMixture(bias=True)
    stored.tensors[f"{LAYER}.gate_up_proj_bias"] = torch.zeros(EXPERTS, INNER)
    with pytest.raises(RiaError, match="gate_up_proj_bias is .* but the model needs"):
        served(stored, activation="swigluoai", has_bias=True)


def test_a_permutation_of_the_wrong_length():
    stored = StoredMixture()
    stored.permutations[f"{LAYER}.2.up_proj"] = torch.arange(HIDDEN + 4).int().numpy()
    with pytest.raises(RiaError, match="permutation of expert 2 has 68 channels"):
        Model(stored.config())


def test_a_fold_into_rows_of_an_expert_from_elsewhere():
    from ria_vllm.serve.folding import RowOrder

    config = StoredMixture().config()
    order = config.permutations[f"{LAYER}.0.down_proj"][::-1].copy()
    config.folding.row_orders[f"{LAYER}.0.up_proj"] = [RowOrder(order)]
    with pytest.raises(RiaError, match="0.up_proj: a fold reorders its rows"):
        Model(config)


def test_experts_that_are_partly_pruned():
    stored = StoredMixture()
    del stored.tensors[f"{LAYER}.2.up_proj.compressed"]
    with pytest.raises(RiaError, match="2.up_proj is not pruned, but others"):
        stored.config()
    stored = StoredMixture()
    stored.tensors[f"{LAYER}.{EXPERTS}.up_proj.compressed"] = torch.zeros(1)
    with pytest.raises(RiaError, match=f"says that there are {EXPERTS} experts"):
        stored.config()


def test_another_number_of_experts():
    with pytest.raises(RiaError, match=f"{EXPERTS} pruned experts, but vLLM's layer has {2 * EXPERTS}"):
        Model(StoredMixture().config(), num_experts=2 * EXPERTS)


def test_an_absurd_number_of_experts():
    """Without files only config.json says how many there are: no loop may run over them."""
    config = StoredMixture().config()
    config.schema.experts[0].num_experts, config.stored, config.experts = 10**15, None, {}
    config.expert_layers = {}
    with pytest.raises(RiaError, match=f"{10**15} pruned experts, but vLLM's layer has {EXPERTS}"):
        Model(config, prefix=LAYER)


def test_nobody_serves_these_experts():
    """No kernel takes several orders, and vLLM's experts for CPUs ignore the limit."""
    with pytest.raises(RiaError, match=f"{LAYER}: no kernel .*--permute-scope shared.*swiglu_limit.*ria-vllm export"):
        Model(StoredMixture("linear").config(), swiglu_limit=0.7)


def test_expert_parallel_with_data_parallel_is_refused(monkeypatch):
    """vLLM gathers the tokens of all ranks after an expert's number was translated to this rank's."""
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    monkeypatch.setattr(moe_config, "get_dp_group", lambda: SimpleNamespace(rank_in_group=0), raising=False)
    with set_current_vllm_config(current), pytest.raises(RiaError, match="without --enable-expert-parallel"):
        Model(StoredMixture().config(), dp_size=2)


def test_a_rank_without_experts_is_refused(monkeypatch):
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    play_rank(monkeypatch, 4, 8)
    with set_current_vllm_config(current), pytest.raises(RiaError, match="4 experts over 8 ranks leave this one"):
        Model(StoredMixture().config(), tp_size=8)


def test_router_weights_on_the_input_of_several_experts_are_refused():
    with pytest.raises(RiaError, match="router's weights on the experts' input, and each token has 2 experts"):
        Model(StoredMixture().config(), apply_router_weight_on_input=True)


def test_adapters_are_refused():
    current = VllmConfig()
    current.lora_config = LoRAConfig(max_lora_rank=8)
    with set_current_vllm_config(current), pytest.raises(RiaError, match="LoRA adapters on the experts"):
        Model(StoredMixture().config())


def test_a_draft_leaves_the_experts_of_its_target_alone():
    """A multi-token prediction model is built with the target's config and reads the same files."""

    class Draft(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(4)

        def load_weights(self, weights):
            return [name for name, _ in weights]

    stored = StoredMixture()
    config = stored.config()
    model = attached(config, Model(config))
    draft = attached(config, Draft())
    rest = {"model.norm.weight": torch.zeros(4)}
    assert draft.load_weights(iter((stored.tensors | rest).items())) == list(rest)
    assert not model.experts.quant_method.loader.loaded

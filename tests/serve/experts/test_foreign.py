"""Experts that compressed-tensors 0.12 stored, in one of vLLM's MoE layers, against a float64 product of the
weights that it dequantizes itself."""

import copy
from dataclasses import replace

import foreign_mixtures
import pytest
import torch
from compressed_tensors_writer import needs_writer
from foreign_mixtures import BITMASK, SPARSE
from mixture_layers import EXPERTS, HIDDEN, INNER, LAYER, Model, attached, play_rank, route, run, served
from packed_checkpoints import Packed, arguments
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.ep_weight_filter import compute_local_expert_ids, should_skip_weight

from ria_vllm.errors import RiaError
from ria_vllm.serve.experts.dense import DenseExpertsMethod

pytestmark = [pytest.mark.usefixtures("ranks"), needs_writer]


FLOATS = {"dtype": torch.float32}
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CASES = {
    "bitmask": Packed("dense", None, sparsity=BITMASK, **FLOATS),
    "plain": Packed("dense", None, sparsity=SPARSE, **FLOATS),
    "bitmask, int8 by tensor": Packed("int-quantized", arguments(8, strategy="tensor"), sparsity=BITMASK),
    "bitmask, fp8": Packed("float-quantized", arguments(8, kind="float"), sparsity=BITMASK),
    "int8": Packed("int-quantized", arguments(8), sparsity=SPARSE),
    "int8 by tensor": Packed("int-quantized", arguments(8, strategy="tensor"), sparsity=SPARSE, **FLOATS),
    "pack, int4": Packed("pack-quantized", arguments(4), sparsity=SPARSE),
    "pack, int4 in groups of 64": Packed("pack-quantized", arguments(4, 64), sparsity=SPARSE, **FLOATS),
    "marlin, int4": Packed("marlin-24", arguments(4)),
    "marlin, int4 in groups": Packed("marlin-24", arguments(4, 128)),
}  # fmt: skip
ROUNDED = {
    "rounded, int8": Packed("int-quantized", arguments(8), BY_TOKEN, sparsity=SPARSE),
    "rounded, pack, int4 in groups of 32": Packed("pack-quantized", arguments(4, 32), BY_TOKEN, sparsity=SPARSE),
    "rounded, marlin, int4": Packed("marlin-24", arguments(4), BY_TOKEN),
}
NOT_24 = {
    "not 2:4, plain": Packed("dense", None, sparsity=SPARSE, spoiled="2.down_proj", **FLOATS),
    "not 2:4, int4 in groups of 32": Packed("pack-quantized", arguments(4, 32), sparsity=SPARSE, spoiled="proj"),
}
ROUNDED_NOT_24 = {"rounded, not 2:4": replace(ROUNDED["rounded, int8"], spoiled="3.gate_proj")}
# Of two ranks, the first has 2:4 experts only, by tensor and by expert parallel.
ONE_ROW = {"spoiled": "2.up_proj", "spoiled_row": 100}
NOT_24_ON_ONE_RANK = {
    "one rank, plain": Packed("dense", None, sparsity=SPARSE, **ONE_ROW, **FLOATS),
    "one rank, int4 in groups of 32": Packed("pack-quantized", arguments(4, 32), sparsity=SPARSE, **ONE_ROW),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    cases = CASES | ROUNDED | NOT_24 | ROUNDED_NOT_24 | NOT_24_ON_ONE_RANK
    return foreign_mixtures.layers(tmp_path_factory.mktemp("experts"), cases)


def close(got, want):
    assert want.std() > 0.05
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_form(stored, experts_path, name):
    model = served(stored[name])
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored[name].expected(x, weights, ids))
    assert (model.experts.ria_experts is not None) == (experts_path != "vllm")


# Half of 128 columns are no whole group of Marlin's.
WHOLE = ["bitmask, int8 by tensor", "int8", "pack, int4 in groups of 64", "marlin, int4"]


def read_by(rank, mixture):
    """A mixture with the tensors that vLLM reads for one of two ranks with `--enable-ep-weight-filter`."""
    here, local = copy.copy(mixture), compute_local_expert_ids(EXPERTS, 2, rank)
    here.config = mixture.config  # which is read from the headers of all files
    here.tensors = {name: one for name, one in mixture.tensors.items() if not should_skip_weight(name, local)}
    return here


def over_ranks(monkeypatch, mixture, expert_parallel=False, dense=None, read=lambda rank, mixture: mixture):
    """The sum over two ranks, and what it must be.

    `dense`: whether vLLM's own method serves each, if not None; `read`: what each reads of the mixture.
    """
    x, weights, ids = route()
    current, total = VllmConfig(), 0
    current.parallel_config.enable_expert_parallel = expert_parallel
    for rank in range(2):
        play_rank(monkeypatch, rank, 2)
        with set_current_vllm_config(current):
            model = served(read(rank, mixture), tp_size=2)
        assert model.experts.local_num_experts == (2 if expert_parallel else 4)
        assert dense is None or (model.experts.ria_experts is None) == dense[rank]
        total = total + run(model, x, weights, ids)
    return total, mixture.expected(x, weights, ids)


@pytest.mark.parametrize("name", WHOLE)
def test_tensor_parallel(stored, experts_path, monkeypatch, name):
    close(*over_ranks(monkeypatch, stored[name]))


@pytest.mark.parametrize("name", ["bitmask, fp8", "int8 by tensor", "marlin, int4 in groups"])
def test_expert_parallel_where_vllm_reads_no_weights_of_other_ranks(stored, experts_path, monkeypatch, name):
    close(*over_ranks(monkeypatch, stored[name], expert_parallel=True, read=read_by))


def test_channels_that_are_not_whole_groups_are_refused(stored, monkeypatch):
    play_rank(monkeypatch, 0, 2)
    with pytest.raises(RiaError, match=f"{LAYER}: .*a group of 128"):
        served(stored["marlin, int4 in groups"], tp_size=2)


@pytest.mark.parametrize("name", ROUNDED)
def test_inputs_that_config_json_wants_rounded(stored, name):
    model = served(stored[name])
    assert str(model.experts.ria_experts.choice) == "cpu with inputs rounded to int8"
    x, weights, ids = route()
    assert_rounded(run(model, x, weights, ids), stored[name].expected(x, weights, ids))


def assert_rounded(got, want):
    assert 1e-3 < (got.double() - want).norm() / want.norm() < 3e-2


def test_experts_that_are_not_24_do_not_round_their_inputs(stored, monkeypatch):
    mixture = stored["rounded, not 2:4"]
    x, weights, ids = route()
    close(run(served(mixture), x, weights, ids), mixture.expected(x, weights, ids))
    close(*over_ranks(monkeypatch, mixture))
    assert_rounded(*over_ranks(monkeypatch, mixture, expert_parallel=True))  # the other rank's experts are 2:4


@pytest.mark.parametrize(("name", "expert_parallel"), [*zip(NOT_24, (False, True))])
def test_experts_that_are_not_24_are_served_dense(stored, experts_path, monkeypatch, name, expert_parallel):
    """By vLLM's own method, if one linear of the layer is not."""
    mixture = stored[name]
    x, weights, ids = route()
    model = served(mixture)
    assert model.experts.ria_experts is None and model.experts.w13_weight.dtype == torch.float32
    report = model.experts.quant_method.report
    assert report.expected == report.loaded == 0
    close(run(model, x, weights, ids), mixture.expected(x, weights, ids))
    close(*over_ranks(monkeypatch, mixture, expert_parallel))


@pytest.mark.parametrize(("name", "expert_parallel"), [*zip(NOT_24_ON_ONE_RANK, (True, False))])
def test_experts_that_are_not_24_on_one_rank(stored, experts_path, monkeypatch, name, expert_parallel):
    """Each rank decides by its own part of the weights."""
    close(*over_ranks(monkeypatch, stored[name], expert_parallel, dense=(experts_path == "vllm", True)))


def test_experts_that_are_not_24_and_that_vllm_does_not_have(stored):
    """A kernel would take them if they were 2:4; vLLM's own for CPUs ignore the limit."""
    with pytest.raises(RiaError, match=f"{LAYER}: .*swiglu_limit"):
        served(stored["not 2:4, plain"], swiglu_limit=0.7)


@pytest.mark.parametrize(("before", "after"), [("plain", "not 2:4, plain"), ("not 2:4, plain", "plain")])
def test_a_reload_with_other_experts(stored, before, after):
    """The layer stays as it was built: by a kernel, or dense."""
    config = stored[before].config()
    model = attached(config, Model(config))
    experts = model.experts
    model.load_weights(iter(stored[before].tensors.items()))
    experts.quant_method.process_weights_after_loading(experts)
    experts.quant_method.loader.create_parameters(experts, torch.float32)  # as vLLM puts them back
    model.load_weights(iter(stored[after].tensors.items()))
    with pytest.raises(RiaError, match=f"{LAYER}: its new weights"):
        experts.quant_method.process_weights_after_loading(experts)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("marlin, int4", lambda t: t.pop(f"{LAYER}.3.down_proj.meta"), "3.down_proj.meta is in none"),
        ("marlin, int4", lambda t: t[f"{LAYER}.3.down_proj.meta"].zero_(), "3.down_proj.meta: row .* damaged"),
        ("int8", lambda t: t.pop(f"{LAYER}.1.up_proj.weight_scale"), "1.up_proj.weight_scale is in none"),
        ("int8 by tensor", lambda t: t.update({f"{LAYER}.1.up_proj.weight_scale": torch.zeros(2)}), r"32 \(2,\), but"),
        ("pack, int4", lambda t: t.update({f"{LAYER}.0.up_proj.weight_zero_point": torch.ones(128, 1)}), "asymmetric"),
        ("bitmask", lambda t: t[f"{LAYER}.2.up_proj.bitmask"].fill_(255), "gate_up: .* damaged"),
        ("plain", lambda t: t.update({f"{LAYER}.2.up_proj.zero": torch.zeros(2)}), "2.up_proj.zero: .* no place")
    ],
)  # fmt: skip
def test_damaged_tensors(stored, name, change, message):
    mixture = stored[name]
    config = mixture.config()
    model = attached(config, Model(config))
    tensors = {name: tensor.clone() for name, tensor in mixture.tensors.items()}
    change(tensors)
    with pytest.raises(RiaError, match=message):
        model.load_weights(iter(tensors.items()))
        model.experts.quant_method.process_weights_after_loading(model.experts)


def test_scales_by_tensor_may_have_no_dimension(stored):
    mixture = stored["int8 by tensor"]
    config = mixture.config()
    model = attached(config, Model(config))
    model.load_weights((name, t[0] if t.shape == (1,) else t) for name, t in mixture.tensors.items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    x, weights, ids = route()
    close(run(model, x, weights, ids), mixture.expected(x, weights, ids))


def test_the_last_expert_is_in_no_file(stored):
    mixture = copy.copy(stored["int8"])
    mixture.tensors = {name: tensor for name, tensor in mixture.tensors.items() if f"{LAYER}.3." not in name}
    with pytest.raises(RiaError, match=f"{LAYER}.3.up_proj is in none of the weight files: they hold 3 experts"):
        Model(mixture.config())


class Skipping(Model):
    """Has no layer for the experts. Takes note of the tensors that reach vLLM's model."""

    def __init__(self, config):
        super().__init__(config)
        self.layers[1].mlp = torch.nn.Identity()

    def load_weights(self, weights):
        self.got = {name for name, _ in weights}
        return self.got


def test_experts_without_a_layer(stored):
    config = stored["int8"].config()
    with pytest.raises(RiaError, match=f"{LAYER} would not be served"):
        attached(config, Skipping(config))
    config = stored["int8"].config()
    with pytest.raises(RiaError, match="dense experts only"):
        attached(config, Model(config, quant_config=None))


def test_plain_experts_without_a_layer_stay_with_vllm(stored):
    """As those of an MTP layer, which vLLM's model of the others skips."""
    mixture = stored["plain"]
    config = mixture.config()
    model = attached(config, Skipping(config))
    model.load_weights(iter(mixture.tensors.items()))
    assert model.got == set(mixture.tensors)
    assert config.experts == config.expert_layers == {} and not config.expert_linears
    assert type(Model(config).experts.quant_method) is DenseExpertsMethod  # a draft's


def test_plain_experts_that_vllm_has_as_linears(stored):
    """Then each of them is served as one."""
    mixture = stored["plain"]
    config = mixture.config()
    model = Model(config)
    linears = {"up_proj": (HIDDEN, INNER), "gate_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}
    model.layers[1].mlp.experts = torch.nn.ModuleList(
        torch.nn.ModuleDict({
            end: ReplicatedLinear(*shape, bias=False, quant_config=config, prefix=f"layers.1.mlp.experts.{e}.{end}")
            for end, shape in linears.items()
        })
        for e in range(EXPERTS)
    )  # fmt: skip
    attached(config, model).load_weights(iter(mixture.tensors.items()))
    layer = model.layers[1].mlp.experts[2]["up_proj"]
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, HIDDEN)
    close(layer.quant_method.apply(layer, x), x.double() @ mixture.plain[f"{LAYER}.2.up_proj"].T)
    assert layer.ria_packed is not None

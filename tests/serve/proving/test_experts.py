"""Experts that prove themselves, as any of our kernels and vLLM's own compute them: nothing that is right is refused,
and whatever they have of another expert, another order or another scale is found."""

from functools import partial

import moe_layers
import pytest
import torch
from moe_layers import EXPERTS, INNER, LAYER, Model, StoredMoE, attached, play_rank
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.torch_utils import set_default_torch_dtype

from ria_vllm.format import proofs
from ria_vllm.format.formats import FORMATS
from ria_vllm.format.schema import Proofs, RiaSchema, SparsityConfig
from ria_vllm.serve.load import file_proofs
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.layer_matching import match_layers
from ria_vllm.serve.proving.experts import proved_experts

pytestmark = pytest.mark.usefixtures("ranks")
OAI = {"activation": "swigluoai", "has_bias": True}
SEED = 1


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Proofs that are made while weights load are of a part of these small layers, too."""
    monkeypatch.setattr(file_proofs, "CHANNELS", 64)
    monkeypatch.setattr(file_proofs, "ROWS", 48)


def vector(size):
    return proofs.vector(size, SEED)


class DenseMoE(StoredMoE):
    """In plain floating point, one by one."""

    def _add(self, name, rows, columns, p):
        weight = torch.randn(rows, columns, generator=self.rng) / columns**0.5 * 1.5
        self.tensors[f"{name}.weight"], self.plain[name] = weight, weight.double()

    def config(self):
        config = RiaConfig(RiaSchema(sparsity_config=SparsityConfig(), proofs=Proofs(seed=SEED, digest="0" * 64)))
        pruned = [f"model.layers.1.self_attn.o_proj.{part}" for part in ("compressed", "bitmask")]
        config._read_names([*self.tensors, *pruned])
        config.names = {name: name for name in config.stored}
        config.packed_modules_mapping, config.served_by = {}, dict.fromkeys(config.required, torch.nn.Module)
        return config


class DenseModel(Model):
    """Loads dense experts as vLLM's models do."""

    def load_weights(self, weights):
        for name, tensor in weights:
            expert, end = name.split(".")[-3:-1]
            shard = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[end]
            parameter = self.experts.w2_weight if shard == "w2" else self.experts.w13_weight
            parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=int(expert))


def of_checkpoint(stored):
    """The proofs that `compress` writes, by the formula."""
    found = {name: proofs.proof(weight, vector(weight.shape[1])) for name, weight in stored.plain.items()}
    downs = {name: weight for name, weight in stored.plain.items() if name.endswith("down_proj")}
    return found | {name + proofs.TRANSPOSED: proofs.proof(w.T, vector(len(w))) for name, w in downs.items()}


def problem(stored, loaded=None, whole=True, **settings):
    """What is wrong with a layer that was given the tensors `loaded` in the place of its own."""
    config = stored.config()
    made = None if whole else config.file_proofs()
    kind = DenseModel if isinstance(stored, DenseMoE) else Model
    model = attached(config, kind(config, **settings))
    if made is not None:
        tensors = list(stored.tensors.items())
        translation = stored.config().translation
        for name, tensor in tensors if translation is None else translation.translate(tensors):
            made.see(name, tensor)
    model.load_weights((name, tensor.clone()) for name, tensor in (loaded or stored.tensors).items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    (experts,) = proved_experts(config, model)
    products = of_checkpoint(stored) if whole else made.take()[1]
    assert experts.can_be_proved(products)
    assert len(experts.matrices) == 3 * model.experts.local_num_experts
    return experts.problem(vector if whole else made.vector, products, whole)


def swapped(one, other):
    """Two linears have each other's tensors."""

    def change(tensors):
        names = {f"{LAYER}.{one}.": f"{LAYER}.{other}.", f"{LAYER}.{other}.": f"{LAYER}.{one}."}
        found = {}
        for name, tensor in tensors.items():
            start = next((start for start in names if name.startswith(start)), None)
            found[name if start is None else names[start] + name.removeprefix(start)] = tensor
        return found

    return change


def changed(linear, change, *parts):
    """Tensors of a linear, which are called so if any name is given."""

    def all_of(tensors):
        return {
            name: change(tensor)
            if name.startswith(f"{LAYER}.{linear}.") and (not parts or name.endswith(parts)) and tensor.dim() == 2
            and tensor.numel() > 2
            else tensor
            for name, tensor in tensors.items()
        }  # fmt: skip

    return all_of


BUGS = {
    "two experts swapped": swapped("1", "2"),
    "gate and up swapped": swapped("2.gate_proj", "2.up_proj"),
    "the up of another expert": swapped("0.up_proj", "3.up_proj"),
    "the down of another expert": swapped("0.down_proj", "3.down_proj"),
    "rows of gate in another order": changed("1.gate_proj", lambda tensor: tensor.roll(1, 0)),
    "rows of up of another shard": changed("1.up_proj", lambda tensor: tensor.roll(INNER // 2, 0)),
    "rows of down in another order": changed("3.down_proj", lambda tensor: tensor.roll(1, 0)),
    "columns of gate in another order": changed(
        "0.gate_proj", lambda tensor: tensor.roll(16, 1), "weight", "compressed"
    ),
    "columns of down in another order": changed(
        "2.down_proj", lambda tensor: tensor.roll(16, 1), "weight", "compressed"
    ),
    "a scale that is off by 3 %": changed("2.down_proj", lambda tensor: tensor * 1.03, "weight", "compressed"),
    "nothing came for a row of gate": changed(
        "1.gate_proj", lambda tensor: torch.cat([tensor[:1] * 0, tensor[1:]]), "weight", "compressed"
    ),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("kind", ["pruned", "pruned with biases", "dense"])
def test_each_bug_is_found(kind, bug, monkeypatch):
    stored = DenseMoE("none") if kind == "dense" else StoredMoE(bias=kind == "pruned with biases")
    loaded = BUGS[bug](stored.tensors)
    settings = OAI if stored.has_bias else {}
    found = problem(stored, loaded, kind != "dense", **settings)
    assert found is not None and found.startswith(f"{LAYER} (") and "do not compute what the checkpoint says" in found


def test_biases_that_are_packed_for_another_expert_are_found(experts_path, monkeypatch):
    stored = StoredMoE(bias=True)
    load = Model.load_weights

    def load_weights(self, weights):
        load(self, weights)
        self.experts.down_bias.data.copy_(self.experts.down_bias.roll(1, 0))

    monkeypatch.setattr(Model, "load_weights", load_weights)
    assert "4 of 4 experts" in problem(stored, **OAI)


@pytest.mark.parametrize("name", ["float", "int8", "int4-g32"])
@pytest.mark.parametrize(("size", "placement"), [(1, None), (2, None), (2, "round_robin")])
def test_nothing_that_is_right_is_refused(experts_path, monkeypatch, name, size, placement):
    """On each rank of tensor parallelism, or of expert parallelism; with biases on both sides of an activation."""
    stored, current = StoredMoE(weight_format=FORMATS[name], bias=True), VllmConfig()
    current.parallel_config.enable_expert_parallel = placement is not None
    current.parallel_config.expert_placement_strategy = placement or "linear"
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        with set_current_vllm_config(current):
            assert problem(stored, tp_size=size, **OAI) is None


@pytest.mark.parametrize(
    ("gpu", "name"), [("hopper_layers", "float"), ("hopper_layers", "fp8"), ("ampere_layers", "int8")]
)
def test_experts_that_a_gpu_keeps_compressed(request, monkeypatch, gpu, name):
    """Products, and the inputs of 8-bit weights, are rounded."""
    request.getfixturevalue(gpu)
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cutlass")
    signs = partial(proofs.vector, seed=SEED, signs_only=name == "fp8")
    monkeypatch.setitem(globals(), "vector", signs)
    stored = StoredMoE(weight_format=FORMATS[name], rounded=name != "float", bias=True)
    if name == "float":
        stored.tensors = {
            key: one.bfloat16() if one.is_floating_point() else one for key, one in stored.tensors.items()
        }
    settings = OAI | {"params_dtype": torch.bfloat16}
    with set_default_torch_dtype(torch.bfloat16):
        assert problem(stored, **settings) is None
        for bug in ("two experts swapped", "the down of another expert", "rows of gate in another order"):
            assert "(cutlass" in problem(stored, BUGS[bug](stored.tensors), **settings)


def test_layers_of_many_channels(monkeypatch):
    """Sums in float32 are off by more than one unit."""
    monkeypatch.setattr(moe_layers, "HIDDEN", 2048)
    monkeypatch.setattr(moe_layers, "INNER", 1024)
    assert problem(StoredMoE(bias=True), **OAI) is None
    assert problem(DenseMoE("none"), whole=False) is None


def test_what_float16_cannot_hold_is_not_asked():
    stored = DenseMoE("none")
    for name in stored.tensors:
        stored.tensors[name] = (stored.tensors[name] * 300).half()
    assert problem(stored, whole=False, params_dtype=torch.float16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_dense_experts(monkeypatch, size, dtype):
    stored = DenseMoE("none")
    stored.tensors = {name: tensor.to(dtype) for name, tensor in stored.tensors.items()}
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        with set_default_torch_dtype(dtype):  # as vLLM loads a model
            assert problem(stored, whole=False, tp_size=size, params_dtype=dtype) is None


def loaded(experts, seed):
    """Dense experts that got random weights, in whatever way."""
    generator = torch.Generator().manual_seed(seed)
    for name in experts.layer.quant_method.created:
        parameter = getattr(experts.layer, name)
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 8
    experts.layer.quant_method.process_weights_after_loading(experts.layer)
    return experts.problem(file_proofs.foreign_vector, experts.given, whole=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("settings", "stored_apart"), [(OAI, True), ({"has_bias": True}, True), ({}, False)])
@pytest.mark.parametrize("rank", [0, 1])
def test_dense_experts_that_vllm_alone_loads(monkeypatch, dtype, settings, stored_apart, rank):
    """They have biases, or their tensors are stacked."""
    config = DenseMoE("none").config()
    play_rank(monkeypatch, rank, 2)
    with set_default_torch_dtype(dtype):
        model = Model(config, tp_size=2, params_dtype=dtype, **settings)
    match_layers(config, model)
    if not stored_apart:
        monkeypatch.setattr(RiaConfig, "dense_experts", lambda self: {})
    experts = next(proved_experts(config, model))
    assert loaded(experts, 1) is None
    assert not experts.matrices and len(experts.given) == 3 * EXPERTS


def test_the_shard_of_another_rank_is_found(monkeypatch):
    stored = StoredMoE(permuted=False)
    loaded = {
        name: tensor
        if name.endswith("shape")
        else tensor.roll(*((tensor.shape[1] // 2, 1) if "down" in name else (INNER // 2, 0)))
        for name, tensor in stored.tensors.items()
    }
    play_rank(monkeypatch, 0, 2)
    assert "do not compute what the checkpoint says" in problem(stored, loaded, tp_size=2)

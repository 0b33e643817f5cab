"""Each pruned linear of a checkpoint is served by exactly one layer, whatever prefix vLLM's authors gave that layer."""


import pytest
import tiny
import torch
from compare import check, generate, prompts
from stored import Stored
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer, WeightsMapper

from ria_vllm.errors import RiaError
from ria_vllm.schema import Fold, Producer
from ria_vllm.serve import claims, plugin
from ria_vllm.serve.claims import settle
from ria_vllm.serve.linear import Sparse24LinearMethod
from ria_vllm.serve.stream import WeightStream

HIDDEN = tiny.HIDDEN
MAMBA = (("mamba_d_conv", 4), ("mamba_d_head", 32), ("mamba_d_state", 16), ("mamba_n_groups", 1), ("mamba_n_heads", 8))
# Families whose layers vLLM names by a prefix that is not their path, or whose fused layers only its loaders know.
FAMILIES = {
    "stablelm": tiny.Family("stablelm", settings=(("hidden_dropout", 0.0), ("attention_dropout", 0.0))),
    "gptj": tiny.Family(
        "gptj",
        settings=(("n_embd", HIDDEN), ("n_layer", 2), ("n_head", tiny.HEADS), ("n_inner", tiny.INNER), ("rotary_dim", 16)),
    ),
    "gemma4_text": tiny.Family(
        "gemma4_text", kv=2,
        settings=(
            ("attention_k_eq_v", True), ("layer_types", ["sliding_attention", "full_attention"]), ("sliding_window", 64),
            ("global_head_dim", tiny.HEAD_DIM), ("num_global_key_value_heads", 2), ("hidden_size_per_layer_input", 0),
            ("num_kv_shared_layers", 0),
        ),
    ),
    "falcon": tiny.Family(
        "falcon",
        settings=(
            ("head_dim", None), ("new_decoder_architecture", True), ("num_kv_heads", 2), ("bias", False), ("alibi", False),
            ("ffn_hidden_size", 4 * HIDDEN), ("hidden_dropout", 0.0), ("attention_dropout", 0.0),
        ),
    ),
    "falcon_h1": tiny.Family("falcon_h1", kv=2, settings=(*MAMBA, ("mamba_d_ssm", 256), ("mamba_expand", 2))),
    "granitemoehybrid": tiny.Family(
        "granitemoehybrid", kv=2,
        settings=(
            *MAMBA, ("mamba_expand", 2), ("layer_types", ["mamba", "attention"]), ("num_local_experts", 0),
            ("num_experts_per_tok", 0), ("shared_intermediate_size", tiny.INNER), ("position_embedding_type", "rope"),
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    models, jobs = {}, []
    for name, family in FAMILIES.items():
        models[name] = tiny.write(family, folder / name, scope="linear", folds=False)
        jobs.append({
            "model": str(folder / name), "prompts": prompts(), "tokens": 6, "engine": {"dtype": "float32"},
        })  # fmt: skip
    results = generate(folder / "run", jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return {name: (models[name], result) for name, result in zip(FAMILIES, results)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_served_as_hugging_face_has_it(served, name):
    check(*served[name])


class Block(torch.nn.Module):
    """A layer of a small model whose authors gave its linears the prefixes `prefixes`."""

    def __init__(self, config, prefixes, quantized=True):
        super().__init__()
        quant_config = config if quantized else None
        self.gate_up = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], quant_config=quant_config, prefix=prefixes[0], return_bias=False
        )
        self.down = RowParallelLinear(INNER, HIDDEN, quant_config=quant_config, prefix=prefixes[1], return_bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(gate * up)


class Model(torch.nn.Module):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": ""}, orig_to_new_stacked={".gate": (".gate_up", 0), ".up": (".gate_up", 1)}
    )

    def __init__(self, config, prefixes=("wrong.gate_up", "wrong.down"), quantized=True):
        super().__init__()
        config.apply_vllm_mapper(self.hf_to_vllm_mapper.get_rename_mapper())
        self.layers = torch.nn.ModuleList([Block(config, prefixes, quantized)])

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


@pytest.fixture
def stored():
    stored = Stored()
    shared = stored.order(HIDDEN)
    for name in ("gate", "up"):
        stored.add(f"{PREFIX}.{name}", INNER, HIDDEN, shared)
    stored.add(f"{PREFIX}.down", HIDDEN, INNER, stored.order(INNER))
    return stored


PREFIX, INNER = "model.layers.0", 256
FOLD = Fold(
    consumer="model.layers.{i}.down",
    producers=[Producer(name="model.layers.{i}.gate"), Producer(name="model.layers.{i}.up")],
    coupling="elementwise",
)


def tensors(stored):
    for name, kinds in stored.tensors.items():
        yield from ((f"{name}.{kind}", tensor.clone()) for kind, tensor in kinds.items())
        yield f"{name}.bias", stored.bias[name].clone()


def built(stored, config, **options):
    model = Model(config, **options)
    settle(config, model)
    config.stream.attach(model, config.check_reload)
    return model


def finished(model):
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.quant_method.process_weights_after_loading(module)
    return model


def expected(stored, x):
    gate, up = stored.apply(x, f"{PREFIX}.gate"), stored.apply(x, f"{PREFIX}.up")
    return stored.apply(gate * up, f"{PREFIX}.down")


@pytest.mark.parametrize(
    "prefixes",
    [
        ("layers.0.gate_up", "layers.0.down"),
        ("wrong.gate_up", "wrong.down"),
        ("", "layers.0.gate"),
        ("layers.0.down", "layers.0.down"),
    ],
)
def test_layers_are_found_by_their_path(ranks, stored, prefixes):
    """Folds and gathers hold, and so do biases, whatever the prefix said: nothing, another linear, or the truth."""
    config = stored.config([FOLD])
    assert config.folding.folded
    model = built(stored, config, prefixes=prefixes)
    assert model.layers[0].down.ria_arrivals.loader_of_model() is None
    model.load_weights(tensors(stored))
    finished(model)
    x = torch.randn(5, HIDDEN)
    want = expected(stored, x)
    assert want.std() > 0.3
    torch.testing.assert_close(model.layers[0](x).double(), want, rtol=0, atol=1e-4)
    assert config.report.expected == config.report.loaded == 2


def test_a_pruned_linear_that_no_layer_serves(ranks, stored):
    stored.add("model.layers.1.down", HIDDEN, INNER)
    with pytest.raises(RiaError, match=r"would not be served: model\.layers\.1\.down\..*no layer of vLLM's Model takes it"):
        built(stored, stored.config())


def test_a_pruned_linear_of_another_stage_is_served_there(ranks, stored):
    stored.add("model.layers.1.down", HIDDEN, INNER)
    config = stored.config()
    model = Model(config)
    model.layers.append(PPMissingLayer())
    settle(config, model)


def test_a_pruned_linear_that_vllm_drops(ranks, stored):
    """As the keys of layers that take another layer's, which some checkpoints ship all the same."""

    class Dropping(Model):
        hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr={"layers.1.": None}) | Model.hf_to_vllm_mapper

    stored.add("model.layers.1.down", HIDDEN, INNER)
    config = stored.config()
    settle(config, Dropping(config))


def test_a_layer_that_takes_dense_weights_only(ranks, stored):
    with pytest.raises(RiaError, match=r"layers\.0\.(down|gate).*vLLM's layer layers\.0\.\w+ takes dense weights only"):
        built(stored, stored.config(), quantized=False)


def test_a_linear_that_two_layers_take(ranks, stored):
    config = stored.config()
    model = Model(config)
    model.layers[0].other = Block(config, ("layers.0.down", "layers.0.down")).down
    model.layers[0]._modules["twin"] = model.layers[0].other
    model.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": ""},
        orig_to_new_stacked=dict(Model.hf_to_vllm_mapper.orig_to_new_stacked) | {".down": (".down", [None, None])},
    )
    del model.layers[0].down
    settle(config, model)  # by the prefix, once, under whichever name
    second = Block(config, ("layers.0.down", "layers.0.down"))
    model.layers[0].second = second.down
    config.served_by.clear()
    config.settled = False
    with pytest.raises(RiaError, match=r"model\.layers\.0\.down: vLLM's Model has more than one layer for it"):
        settle(config, model)


def test_a_dense_layer_that_a_prefix_took_for_a_pruned_one(ranks, stored):
    """Its path says otherwise, so it becomes dense again, with vLLM's own method."""
    config = stored.config()
    config.stored.add("model.extra")
    config.names["model.extra"] = "model.extra"
    model = Model(config)
    model.extra = ReplicatedLinear(HIDDEN, INNER, quant_config=config, prefix="layers.0.down", return_bias=False)
    settle(config, model)
    assert type(model.extra.quant_method) is UnquantizedLinearMethod
    assert model.extra.weight.shape == (INNER, HIDDEN) and not hasattr(model.extra, "compressed")
    weight = torch.randn(INNER, HIDDEN)
    model.extra.weight.weight_loader(model.extra.weight, weight)
    assert torch.equal(model.extra.weight, weight)


def test_a_second_model_of_the_same_checkpoint(ranks, stored):
    """The draft of a multi-token prediction is built with the target's config; it need not use all, and what the target
    serves is not the draft's, though its layers may have the same path."""

    class Draft(Model):
        pass

    config = stored.config()
    target = built(stored, config)
    draft = Draft(config, prefixes=("mtp.layers.0.gate_up", "mtp.layers.0.down"))
    settle(config, draft)
    assert {type(m.quant_method) for m in draft.modules() if isinstance(m, LinearBase)} == {UnquantizedLinearMethod}
    assert isinstance(target.layers[0].down.quant_method, Sparse24LinearMethod)
    settle(config, Model(config))  # built anew


def test_a_draft_leaves_what_another_stage_serves_alone(ranks, stored):
    class Draft(Model):
        pass

    config = stored.config()
    target = Model(config)
    target.layers[0] = PPMissingLayer()
    settle(config, target)
    draft = Draft(config, prefixes=("mtp.layers.0.gate_up", "mtp.layers.0.down"))
    settle(config, draft)
    assert {type(m.quant_method) for m in draft.modules() if isinstance(m, LinearBase)} == {UnquantizedLinearMethod}


def test_of_equal_tensors_the_one_that_is_meant_gives_its_name():
    stream, zero = WeightStream(), torch.zeros(4)
    names = ["k.bias", "v.bias"]
    for name, _ in stream.named((name, torch.zeros(4)) for name in names):
        pass
    assert [stream.name_of(zero.clone(), [name]) for name in names] == names


def test_a_loader_that_the_model_gave_its_weight_stays(ranks, stored):
    """As Mamba 2 does, to share groups between ranks."""
    config = stored.config()
    model = Model(config)
    called = []

    def loader(param, loaded_weight):
        called.append(tuple(loaded_weight.shape))
        param.data.copy_(loaded_weight)

    model.layers[0].down.weight.weight_loader = loader
    settle(config, model)
    config.stream.attach(model, config.check_reload)
    model.load_weights(tensors(stored))
    assert called == [(HIDDEN, INNER // 2), (HIDDEN, INNER // 8)]


def test_tensors_that_a_model_changes_are_refused(ranks, stored):
    config = stored.config()
    model = built(stored, config)
    changed = ((name, tensor * 1 if name.endswith("down.compressed") else tensor) for name, tensor in tensors(stored))

    class Rearranging(Model):
        def load_weights(self, weights):
            return super().load_weights(
                (n, t.flip(0) if n.endswith("down.compressed") else t) for n, t in weights
            )

    model.load_weights(changed)  # before the stream begins, whoever sends it may have made it
    config.served_by.clear()
    model = Rearranging(config)
    settle(config, model)
    config.stream.attach(model, config.check_reload)
    with pytest.raises(RiaError, match=r"model\.layers\.0\.down\.compressed: vLLM changes it before its layer loads it"):
        model.load_weights(tensors(stored))


def test_tensors_that_a_model_confuses_are_refused(ranks, stored):
    class Confusing(Model):
        def load_weights(self, weights):
            swapped = {"gate": "up", "up": "gate"}
            names = ((name.split("."), tensor) for name, tensor in weights)
            return super().load_weights((".".join(swapped.get(p, p) for p in parts), t) for parts, t in names)

    config = stored.config()
    model = Confusing(config)
    settle(config, model)
    config.stream.attach(model, config.check_reload)
    with pytest.raises(RiaError, match=r"vLLM loads model\.layers\.0\.gate\.compressed where model\.layers\.0\.up belongs"):
        model.load_weights(tensors(stored))


def test_a_copy_of_a_tensor_has_its_name():
    """Pooling models of vLLM copy the first tensors, Gemma 4 the keys that are values too."""
    kept = {"a.bitmask": torch.randint(99, (4, 4), dtype=torch.uint8), "a.weight": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    kept |= {"a.compressed": torch.full((4, 4), torch.nan), "a.weight_scale": torch.tensor(0.5)}
    stream = WeightStream()
    for name, tensor in stream.named(kept.items()):
        copies = tensor.detach(), tensor.clone()
        assert [stream.name_of(other) for other in (tensor, *copies)] == [name] * 3
        stream.recent.clear()
        assert [stream.name_of(other) for other in copies] == [name] * 2  # a reload asks again
        stream.recent.append((tensor, name))
        if tensor.dim() and name != "a.compressed":
            for other in (tensor[1:], tensor.view(torch.uint8).flip(0).view(tensor.dtype), tensor.view(torch.int8)):
                assert stream.name_of(other) is None


def test_a_reload_is_checked_before_anything_of_it_is_loaded(ranks, stored):
    config = stored.config()
    model = Model(config)
    settle(config, model)
    checked = []

    def check(from_files):
        checked.append(from_files)
        if from_files:
            raise RiaError("other orders")

    config.stream.attach(model, check)
    model.load_weights(tensors(stored))
    assert not checked
    finished(model)
    x = torch.randn(3, HIDDEN)
    before = model.layers[0](x)
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    with pytest.raises(RiaError, match="other orders"):
        model.load_weights(tensors(stored))
    assert torch.equal(model.layers[0](x), before)  # and the server goes on with what it has
    checked.clear()
    model.load_weights([])  # of a trainer, from no file
    assert checked == [False]


def test_a_load_after_made_up_weights_is_checked(ranks, stored):
    config = stored.config()
    model = Model(config)
    settle(config, model)
    config.stream.attach(model, config.check_reload, loaded=True)
    config.unread = "here: permutations.safetensors is missing."
    for weights in (tensors(stored), list(tensors(stored))):  # of files, of a trainer
        with pytest.raises(RiaError, match="is missing. This server was started with made-up weights without that"):
            model.load_weights(weights)


def test_an_output_that_does_not_come_is_missed(ranks, stored):
    """Also where the files lack it, so that nobody expects it."""
    del stored.tensors[f"{PREFIX}.up"]
    config = stored.config()
    model = built(stored, config)
    model.load_weights(tensors(stored))
    with pytest.raises(RiaError, match=r"model\.layers\.0\.gate\.compressed is in none of the weight files"):
        finished(model)


def test_models_inside_a_model_wait_for_the_outermost(ranks, stored, monkeypatch):
    """vLLM builds them by the same function; only the outermost has the paths that the checkpoint knows."""
    from vllm.model_executor.model_loader import utils

    settled = []
    monkeypatch.setattr(claims, "settle", lambda config, model: settled.append(type(model)))
    monkeypatch.setattr(utils, "record_metadata_for_reloading", lambda model: None)
    plugin.watch_models()
    config = get_current_vllm_config()
    monkeypatch.setattr(config, "quant_config", stored.config())

    class Inner(Model):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__(vllm_config.quant_config)

    class Outer(Inner):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__(vllm_config=vllm_config)
            self.inner = utils.initialize_model(vllm_config, model_class=Inner, model_config=vllm_config.model_config)
            assert settled == []

    class Failing(Inner):
        def __init__(self, *, vllm_config, prefix=""):
            utils.initialize_model(vllm_config, model_class=Inner, model_config=vllm_config.model_config)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        utils.initialize_model(config, model_class=Failing, model_config=config.model_config)
    utils.initialize_model(config, model_class=Outer, model_config=config.model_config)
    assert settled == [Outer]

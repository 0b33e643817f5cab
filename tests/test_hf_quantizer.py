"""`from_pretrained` of a compressed folder, under every name that transformers may give to what it holds."""

import shutil
from dataclasses import replace

import pytest
import torch
from damage import rewrite
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaModel,
)

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FP8, INT8, INTEGERS

TOKENS = torch.arange(3, 60)[None]


def hidden(model) -> torch.Tensor:
    """The last hidden state, of whatever class the model is."""
    with torch.no_grad():
        return getattr(model, model.base_model_prefix, model)(TOKENS).last_hidden_state


@pytest.fixture(scope="module")
def expected(pruned_llama) -> torch.Tensor:
    """The last hidden state of the dense model with the pruned weights put in, in its own order."""
    dense = LlamaModel.from_pretrained(pruned_llama.source)
    state = {
        name.removeprefix("model."): tensor for name, tensor in pruned_llama.dense.items() if name != "lm_head.weight"
    }
    dense.load_state_dict(state, strict=True)
    return hidden(dense)


@pytest.mark.parametrize(
    "auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_the_same_hidden_state_in_every_class(pruned_llama, expected, auto):
    assert torch.equal(hidden(auto.from_pretrained(pruned_llama.folder)), expected)


each_format = pytest.mark.parametrize("format", [FLOAT, INT8, INTEGERS[4, 32], FP8], ids=lambda format: format.name)


def store(model, out, pruned, renames=(), format=FLOAT) -> None:
    """Prune the linears `pruned` of `model` in place, randomly permuted; store it under names changed by `renames`.

    Its weights then are as `format` quantizes them for its dtype.
    """
    from ria_vllm.checkpoint.writer import CheckpointWriter
    from ria_vllm.format import sparse24
    from ria_vllm.format.permutation import invert
    from ria_vllm.format.schema import RiaSchema, SparsityConfig, WeightQuantization

    def on_disk(name: str) -> str:
        for old, new in renames:
            name = name.replace(old, new)
        return name

    unit, dtype = {}, model.dtype
    for name in pruned:
        weight = model.get_submodule(name).weight
        p = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(len(unit)))
        mask = sparse24.mask_from_bitmask(sparse24.compress(weight.data[:, p])[1])
        stored, scales = format.quantize(weight.data[:, p] * mask, dtype)
        parts = format.encode(stored, mask, scales) | {"shape": torch.tensor(weight.shape).view(2, 1)}
        parts["input_permutation"] = p.int()
        unit |= {f"{on_disk(name)}.{part}": tensor for part, tensor in parts.items()}
        weight.data = stored[:, invert(p)]
    left = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in pruned}
    unit |= {on_disk(name): tensor.contiguous() for name, tensor in left.items()}
    words = format.quantization and WeightQuantization(**format.quantization, dtype=str(dtype).removeprefix("torch."))
    schema = RiaSchema(sparsity_config=SparsityConfig(ignore=["lm_head"]), weights=words, recipe={"permute": "lsa"})
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "quantization_config": schema.model_dump(),
    }
    writer = CheckpointWriter(out)
    writer.write("all", unit)
    writer.finish(["all"], {"config.json": config}, {}, 10**9)


def tiny_model(model_type: str, **settings):
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, **shape | heads | settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def linears_of(model) -> list[str]:
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, torch.nn.Linear) and ".layers." in name]


def test_modules_that_transformers_renames(tmp_path):
    """Nemotron-H is `backbone` on disk and `model` in transformers."""
    model = tiny_model("nemotron_h", layers_block_type=["attention", "mlp"])
    store(model, tmp_path / "out", linears_of(model), [("model.", "backbone.")])
    assert "backbone.layers.1.mixer.up_proj" in Reader(tmp_path / "out").permutations
    for auto in (AutoModelForCausalLM, AutoModel):
        assert torch.equal(hidden(auto.from_pretrained(tmp_path / "out")), hidden(model))


@each_format
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_names_that_the_caller_maps(tmp_path, auto, format):
    """Also submodules, and two whose names are swapped."""
    model = tiny_model("llama")
    swapped = [("gate_proj", "?"), ("up_proj", "gate_proj"), ("?", "up_proj")]
    renames = [("model.layers", "h"), ("self_attn.q_proj", "a.query"), *swapped]
    store(model, tmp_path / "out", linears_of(model), renames, format)
    mapping = {
        r"^h\.": "model.layers.", r"a\.query": "self_attn.q_proj",
        "gate_proj": "kept", "up_proj": "gate_proj", "kept": "up_proj",
    }  # fmt: skip
    loaded = auto.from_pretrained(tmp_path / "out", key_mapping=mapping)
    assert torch.equal(hidden(loaded), hidden(model))


def test_saved_under_the_names_of_the_files(tmp_path):
    model = tiny_model("llama")
    store(model, tmp_path / "out", linears_of(model), [("model.layers", "h")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", key_mapping={r"^h\.": "model.layers."})
    loaded.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == {name.replace("model.layers", "h") for name in model.state_dict()}
    assert torch.equal(saved["h.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)


def test_the_body_alone_is_stored(tmp_path):
    """Here transformers adds the prefix that it strips elsewhere."""
    model = tiny_model("llama")
    body = model.model
    store(body, tmp_path / "out", [name.removeprefix("model.") for name in linears_of(model)])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(hidden(loaded), hidden(body))


@pytest.mark.parametrize(
    ("format", "auto", "dtype"),
    [
        (INT8, AutoModelForCausalLM, torch.float16),
        (INTEGERS[4, None], AutoModel, torch.bfloat16),
        (INTEGERS[4, 32], AutoModelForCausalLM, torch.float32),
        (INTEGERS[4, 32], AutoModel, torch.float16),
    ],
)
def test_scales_are_read_as_they_are_stored(tmp_path, format, auto, dtype):
    """Whatever the dtype of the model. These are so small that float16 would round them."""
    model = tiny_model("llama", initializer_range=1e-4).bfloat16()
    store(model, tmp_path / "out", linears_of(model), format=format)
    reader = Reader(tmp_path / "out")
    loaded = auto.from_pretrained(tmp_path / "out", dtype=dtype).base_model
    for name in linears_of(model):
        exact = replace(reader.linear(name), dtype=torch.float64).dense()
        assert torch.equal(loaded.get_submodule(name.removeprefix("model.")).weight, exact.to(dtype))


@pytest.mark.parametrize("place", ["model.layers.0.mlp.other_proj", "model.layers.5.mlp.up_proj"])
def test_a_pruned_linear_more_than_the_model_has_places_for(damage, place):
    """In the layers that it has. All of its own weights are there."""

    def double(tensors):
        tensors.update({f"{place}{n.removeprefix(Q)}": t.clone() for n, t in tensors.items() if n.startswith(f"{Q}.")})

    rewrite(damage.file_of(f"{Q}.bitmask"), double)
    with pytest.raises(RiaError, match=f"{place} is stored compressed, but .* no place .* LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(damage.folder)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("part", ["bitmask", "shape"])
def test_a_missing_part_is_named(damage, part):
    damage.replace(f"{Q}.{part}", lambda tensor: None)
    damage.edit_json("model.safetensors.index.json", lambda c: c["weight_map"].pop(f"{Q}.{part}"))
    with pytest.raises(RiaError, match=f"{Q}"):
        AutoModelForCausalLM.from_pretrained(damage.folder)


@pytest.mark.parametrize("shape", [torch.tensor([128]), torch.tensor(128), torch.ones(2)])
def test_an_odd_shape_is_named(damage, shape):
    damage.replace(f"{Q}.shape", lambda tensor: shape)
    with pytest.raises(RiaError, match=f"{Q}.shape is not two int64 numbers"):
        AutoModelForCausalLM.from_pretrained(damage.folder)


def test_dense_and_compressed_at_once(damage):
    rewrite(damage.file_of(f"{Q}.bitmask"), lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(128, 128)}))
    with pytest.raises(RiaError, match=f"{Q}.weight.*not the tensors of one pruned linear"):
        AutoModelForCausalLM.from_pretrained(damage.folder)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_a_dense_weight_under_the_short_name_of_a_pruned_one(damage, auto):
    short = f"{Q}.weight".removeprefix("model.")
    rewrite(damage.file_of(f"{Q}.bitmask"), lambda tensors: tensors.update({short: torch.zeros(128, 128)}))
    with pytest.raises(RiaError, match="both stored, but they are one weight") as caught:
        auto.from_pretrained(damage.folder)
    assert f"{Q}.weight" in str(caught.value) and f" {short} " in str(caught.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(pruned_llama, tmp_path, monkeypatch):
    """The hub's cache after transformers has asked for user/model's weights: subfolder -> the folder with them.

    The hub is not asked: transformers would look there for an adapter, for all that `local_files_only` says.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(subfolder: str):
        repository = tmp_path / "cache" / "models--user--model"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        folder = repository / "snapshots" / COMMIT / subfolder
        shutil.copytree(pruned_llama.folder, folder)
        (folder / "permutations.safetensors").unlink()
        return folder

    return put


@pytest.mark.parametrize("subfolder", ["", "deep/er"])
def test_permutations_come_from_where_the_weights_do(pruned_llama, cached, monkeypatch, tmp_path, expected, subfolder):
    """The same repository, commit, subfolder and cache: transformers has fetched the weights only."""
    folder, asked = cached(subfolder), []

    def fetch(repository, name, **options):
        asked.append((repository, name, options["revision"], options["cache_dir"], options["subfolder"]))
        return str(pruned_llama.folder / name)

    monkeypatch.setattr("ria_vllm.hf.quantizer.cached_file", fetch)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True, "subfolder": subfolder}
    loaded = AutoModel.from_pretrained("user/model", **options)
    assert torch.equal(hidden(loaded), expected) and (folder / "config.json").is_file()
    assert asked == [("user/model", "permutations.safetensors", COMMIT, str(tmp_path / "cache"), subfolder)]


def test_permutations_that_the_hub_does_not_provide(cached, monkeypatch, tmp_path):
    """The hub may require a token. from_pretrained had one; this code does not."""
    cached("")

    def refuse(*_, **__):
        raise OSError("You are trying to access\na gated repo.")

    monkeypatch.setattr("ria_vllm.hf.quantizer.cached_file", refuse)
    with pytest.raises(RiaError, match="trying to access a gated repo.*`hf auth login`.*`hf download user/model`"):
        AutoModel.from_pretrained("user/model", cache_dir=tmp_path / "cache", local_files_only=True)


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.compressed", "model.norm.weight", "lm_head.weight"])
def test_shapes_that_config_json_contradicts(damage, tensor):
    change = {"mlp": {"intermediate_size": 256}, "norm": {"hidden_size": 64}, "head": {"vocab_size": 999}}
    damage.edit_json("config.json", lambda c: c.update(next(v for k, v in change.items() if k in tensor)))
    with pytest.raises(RiaError, match="has shape .* by config.json"):
        AutoModelForCausalLM.from_pretrained(damage.folder)


def test_a_tensor_in_two_files(damage):
    """transformers would take the last one."""
    other = next(path for path in damage.folder.glob("model-*") if path != damage.file_of("model.norm.weight"))
    rewrite(other, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(128)}))
    with pytest.raises(RiaError, match="model.norm.weight is in two weight files"):
        AutoModelForCausalLM.from_pretrained(damage.folder)


def test_a_configuration_that_does_not_say_that_weights_are_compressed(pruned_llama):
    """transformers would give the model random ones."""
    config = AutoConfig.from_pretrained(pruned_llama.folder)
    del config.quantization_config
    with pytest.raises(RiaError, match="proj is stored compressed, but the LlamaConfig .* has no quantization_config"):
        AutoModelForCausalLM.from_pretrained(pruned_llama.folder, config=config)

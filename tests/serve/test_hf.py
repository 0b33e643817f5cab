"""`from_pretrained` on a compressed folder (ria_vllm/hf), on the small checkpoints of `tiny`."""

import subprocess
import sys
from dataclasses import replace

import pruned_moe
import pytest
import tiny
import torch
from damage import bind, rewrite
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextModel,
    LlamaPreTrainedModel,
)
from wrappers import compressed_wrapper

from ria_vllm.errors import RiaError


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits.float()


def run_alone(code):
    """Run a program in a process that has imported nothing."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "phi3"])
def test_loads_as_the_plain_model_and_saves_as_one(name, tmp_path):
    pruned = tiny.write(tiny.FAMILIES[name], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(logits(loaded), logits(pruned), rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "plain")
    assert not hasattr(loaded.config, "quantization_config")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2"])
def test_a_head_and_an_embedding_in_int8_are_widened(name, tmp_path):
    """Tied to each other, or not."""
    pruned = tiny.write(tiny.FAMILIES[name], tmp_path / "out", weights="int8", head=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = {key.removesuffix(".integers") for key in tensors if key.endswith(".integers")}
    assert stored == {"model.embed_tokens"} | ({"lm_head"} if name == "llama-gqa" else set())
    for one in stored:
        want = tensors[f"{one}.integers"] * tensors[f"{one}.weight_scale"]
        assert torch.equal(loaded.get_submodule(one).weight, want)
    torch.testing.assert_close(logits(loaded), logits(pruned), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "weights"), [("gpt_oss", "int4-g32"), ("granitemoe", "int8")])
def test_experts_without_a_head(name, weights, tmp_path):
    """transformers strips the base model's prefix from the names of experts, too."""
    folder, dense = pruned_moe.write(pruned_moe.FAMILIES[name], tmp_path, weights=weights)
    want = AutoModel.from_pretrained(dense, dtype=torch.float32).state_dict()
    found = AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert want.keys() == found.keys() and any("experts" in name for name in want)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


MIXTRAL = pruned_moe.FAMILIES["mixtral"]


@pytest.mark.parametrize("weights", ["int8"])
@pytest.mark.parametrize("name", ["mixtral", "minimax_m2", "granitemoe", "llama4"])
def test_experts_are_saved_as_in_the_dense_files(name, weights, tmp_path):
    """Not as transformers holds them, which other programs do not read."""
    family = pruned_moe.FAMILIES.get(name) or replace(MIXTRAL, model_type=name)
    folder, dense = pruned_moe.write(family, tmp_path, weights=weights)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    check_files(tmp_path / "saved", dense)


def check_files(found, want):
    found, want = (load_file(folder / "model.safetensors") for folder in (found, want))
    assert want.keys() == found.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_saved_with_experts_that_are_not_pruned(tmp_path):
    """For them, transformers has used its own conversions already."""
    folder, dense = pruned_moe.write(MIXTRAL, tmp_path, dense_layer=1)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    check_files(tmp_path / "saved", dense)


def test_experts_that_nothing_maps(tmp_path):
    """Nothing else is pruned here, and transformers would give the layer random ones."""
    folder, _ = pruned_moe.write(pruned_moe.FAMILIES["qwen3_moe"], tmp_path)
    renamed = ("layers.1.mlp.experts.", "layers.1.mlp.others.")

    def rename(tensors):
        for name in [name for name in tensors if renamed[0] in name]:
            tensors[name.replace(*renamed)] = tensors.pop(name)

    for path in folder.glob("*.safetensors"):
        rewrite(path, rename)
    bind(folder)
    with pytest.raises(RiaError, match="model.layers.1.mlp.others.0.down_proj is stored compressed, but .* no place"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_text_decoder_of_a_wrapper(tmp_path):
    """transformers takes its configuration out of the wrapper's, and leaves `quantization_config` behind."""
    out = compressed_wrapper(tmp_path, "gemma3")
    with pytest.raises(RiaError, match="is stored compressed, but the .*Text.* that this Gemma3TextModel is load"):
        Gemma3TextModel.from_pretrained(out)
    whole, want = (kind.from_pretrained(out).state_dict() for kind in (AutoModel, AutoModelForImageTextToText))
    inside = {name: tensor for name, tensor in whole.items() if name.startswith("language_model.")}
    assert inside and all(torch.equal(tensor, want[f"model.{name}"]) for name, tensor in inside.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.bfloat16])
def test_what_transformers_keeps_in_float32(tmp_path, monkeypatch, dtype, stored):
    """As it does for a dense model. Without a head it renames all tensors. Some it keeps in a float16 model only."""
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "out", dtype=stored)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["input_layernorm"])
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["post_attention_layernorm"])
    found, want = (
        {name: p.dtype for name, p in AutoModel.from_pretrained(tmp_path / folder, dtype=dtype).named_parameters()}
        for folder in ("out", "dense")
    )
    assert found == want and len(set(want.values())) == (1 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("first", ["ria_vllm", "transformers.modeling_utils"])
def test_import_is_light_and_in_any_order(first):
    code = (
        f"import sys, {first}\n"
        "assert sys.modules.get('ria_vllm') is None or 'torch' not in sys.modules\n"
        "import ria_vllm, transformers.quantizers.auto as auto\n"
        "assert 'ria' in auto.AUTO_QUANTIZER_MAPPING\n"
        "import transformers.modeling_utils as loading\n"
        "assert loading.convert_and_load_state_dict_in_model.ria_checks\n"
    )
    run_alone(code)

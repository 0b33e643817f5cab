"""Linears that stay dense beside pruned ones of integers: in int8, in every reader. The oracle reads the files."""

import json

import pytest
import torch
from compressing import interrupted_after_a_layer, run_small
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.inventory import take_inventory
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.export import export_dense
from ria_vllm.offline.run.compress import Settings

UP = "model.layers.1.mlp.up_proj"
OPTIONS = {"weights": "int8", "activations": "int8", "ignore": (r"1\.mlp\.up_proj",)}


@pytest.fixture(scope="module", params=["none", "short"])
def folder(request, tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "out"
    run_small(tiny("llama"), out, text, reconstruct=request.param, smooth=0.0, **OPTIONS)
    return out


def test_what_vllm_fuses_is_in_int8_as_a_whole(folder, tiny):
    reader, tensors = Reader(folder), load_file(folder / "model.safetensors")
    mixed = ["model.layers.1.mlp.gate_proj", UP]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert sorted(config["int8_linears"]) == mixed
    assert set(reader.int8_names) == {*mixed, "lm_head", "model.embed_tokens"}
    assert list(reader.problems()) == [] and len(reader.sparse_names) == 12
    assert set(reader.report()["dense_in_int8"]) == set(mixed) and not set(mixed) & set(reader.report()["linears"])
    dense = load_file(tiny("llama") / "model.safetensors")
    for name in mixed:
        integers, scales = tensors[f"{name}.integers"].double(), tensors[f"{name}.weight_scale"].double()
        steps = (integers - dense[f"{name}.weight"].double() / scales).abs()
        assert float(steps[integers.abs() < 127].max()) <= 0.5 + 1e-4
    assert take_inventory(reader)["totals"]["dense_bytes"] == sum(tensor.nbytes for tensor in dense.values())


def test_transformers_and_export_read_them(folder, tmp_path):
    tensors, model = load_file(folder / "model.safetensors"), AutoModelForCausalLM.from_pretrained(folder)
    want = tensors[f"{UP}.integers"] * tensors[f"{UP}.weight_scale"]
    linear = model.get_submodule(UP)
    assert torch.equal(linear.weight, want)
    x = torch.randn(3, linear.in_features)
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = ((x / scale).round() * scale) @ want.double().T
    torch.testing.assert_close(linear(x).double(), rounded, rtol=1e-5, atol=1e-5)
    assert len(model.lm_head._forward_pre_hooks) == 0
    export_dense(Reader(folder), tmp_path / "dense", 1 << 30)
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")[f"{UP}.weight"], want)


@pytest.mark.parametrize("reconstruct", ["admm", "short"])
def test_a_resumed_run_writes_the_same(reconstruct, tiny, text, tmp_path):
    options = {"weights": "int4", "group_size": 32, "ignore": (r"0\.self_attn\.o_proj",), "reconstruct": reconstruct}
    run_small(tiny("llama"), tmp_path / "whole", text, **options)
    with interrupted_after_a_layer():
        run_small(tiny("llama"), tmp_path / "out", text, **options)
    run_small(tiny("llama"), tmp_path / "out", text, Settings(resume=True), **options)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys() and "model.layers.0.self_attn.o_proj.integers" in whole
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

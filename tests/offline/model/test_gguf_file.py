"""Converting GGUF files, which gguf's own writer has written."""

import sys

import numpy as np
import pytest
import torch
from compressing import logits
from gguf_files import write_gguf
from safetensors.torch import load_file

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.gguf.gguf_file import convert_gguf


def test_a_whole_file_becomes_the_model_that_was_written(tiny, tmp_path):
    convert_gguf(write_gguf(tmp_path / "m.gguf", tiny("llama")), tmp_path / "out")
    written = load_file(tiny("llama") / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in written.items())
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tiny("llama")), atol=0.1, rtol=0.1)


def without_a_block(tensors):
    for name in [name for name in tensors if name.startswith("blk.1.")]:
        del tensors[name]


def test_missing_tensors_do_not_become_random_weights(tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), change=without_a_block)
    with pytest.raises(RiaError, match="m.gguf: weights missing: model.layers.1.input_layernorm.weight, .*original"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_shape_does_not_become_random_weights(tiny, tmp_path):
    def narrow(tensors):
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:-64]

    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), change=narrow)
    with pytest.raises(RiaError, match=r"m.gguf: model.layers.0.mlp.up_proj.weight has shape .128, 128., .*.192, 128."):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize("whole", [True, False])
def test_one_part_of_a_split_file_is_refused(whole, tiny, tmp_path):
    change = (lambda tensors: None) if whole else without_a_block
    keys = {"split.no": 0, "split.count": 2, "split.tensors.count": 21}
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", tiny("llama"), change=change, **keys)
    with pytest.raises(RiaError, match="m-00001-of-00002.gguf: 1 of 2 parts of a model.*llama-gguf-split --merge"):
        convert_gguf(path, tmp_path / "out")


def test_a_file_with_a_single_part_is_whole(tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), **{"split.no": 0, "split.count": 1})
    convert_gguf(path, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_tensors_that_transformers_leaves_out_are_named(tiny, tmp_path):
    """transformers makes a llama without biases of every such file."""

    def biased(tensors):
        tensors["blk.0.attn_q.bias"] = np.ones(128, np.float32)

    with pytest.raises(RiaError, match="m.gguf: transformers leaves out blk.0.attn_q.bias"):
        convert_gguf(write_gguf(tmp_path / "m.gguf", tiny("llama"), change=biased), tmp_path / "out")


def test_without_the_package_gguf(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RiaError, match="m.gguf: .*gguf.* Install what is missing: pip install gguf accelerate"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")

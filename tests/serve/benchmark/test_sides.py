"""What the sides of a comparison are called."""

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark.machine import weight_bytes
from ria_vllm.serve.benchmark.sides import sides_of


def names(*arguments) -> list[tuple[str, str]]:
    return [(side.name, side.model) for side in sides_of(*arguments)]


def test_a_pair_is_dense_and_sparse():
    assert names(["models/a"], ["models/b"]) == [("dense", "models/a"), ("sparse", "models/b")]


def test_several_are_called_like_their_folders(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"12345")
    sides = sides_of(["org/dense", "x/w8a8/"], ["out", str(tmp_path / "model.gguf")])
    assert [side.name for side in sides] == ["dense", "w8a8", "out", "model"]
    assert [side.bytes for side in sides] == [None, None, None, 5]


def test_names_are_given():
    assert names(["bf16=org/model"], ["2of4=out"]) == [("bf16", "org/model"), ("2of4", "out")]
    assert names(["bf16=org/model"], ["a/out"]) == [("bf16", "org/model"), ("out", "a/out")]


def test_a_path_may_contain_an_equals_sign(tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert names([str(folder)], ["x=y/z=1"]) == [("a=b", str(folder)), ("x", "y/z=1")]
    assert names(["x/a=b", "y"], ["z"])[0] == ("a=b", "x/a=b")


def test_a_name_that_no_side_can_have():
    with pytest.raises(RiaError, match="'2:4' cannot be the name of org/model"):
        names(["2:4=org/model"], ["out"])


def test_two_of_one_name():
    with pytest.raises(RiaError, match="x/a and y/a would both be called a.*NAME=y/a"):
        sides_of(["x/a", "y/a"], ["z"])


def test_arguments_of_one_side():
    arguments = [("w8a8", "--dtype float32"), ("w8a8", "--tokenizer 'a b'")]
    first, second, third = sides_of(["bf16", "w8a8"], ["out"], arguments)
    assert second.arguments == ("--dtype", "float32", "--tokenizer", "a b") and not first.arguments + third.arguments
    with pytest.raises(RiaError, match="w4a16: no such side. There are bf16, w8a8, out"):
        sides_of(["bf16", "w8a8"], ["out"], [("w4a16", "")])


def test_a_second_copy_of_the_weights_does_not_count(tmp_path):
    """Mistral's repositories have the weights twice, of which vLLM loads one."""
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(60))
    assert weight_bytes(str(tmp_path)) == 60
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(40))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(20))
    assert weight_bytes(str(tmp_path)) == 60

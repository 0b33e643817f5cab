"""The command itself: defaults, messages, exit codes."""

import re

import pytest
import torch
from click.testing import CliRunner

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.commands import compress
from ria_vllm.offline.distill.command import distill


def invoke(*arguments: object):
    return CliRunner().invoke(compress, [str(a) for a in arguments])


def test_with_nothing_but_a_model_it_writes_its_own_text(tiny, tmp_path):
    result = invoke(tiny("llama"), "-o", tmp_path / "out", "--samples", 2)
    assert result.exit_code == 0, result.output
    recipe = Reader(tmp_path / "out").schema.recipe
    assert recipe["calibration"] == "self" and recipe["reconstruct"] == "short" and recipe["permute"] == "lsa"
    assert recipe["seq_len"] == 128  # as long as this model reads, not the 2048 of the default
    said = r"this takes about .* \(writing text .*, pruning .*\)"
    assert "at most 128 tokens" in result.stderr and re.search(said, result.stderr)
    assert "model.layers.1.mlp.down_proj: retained score" in result.stderr
    seconds = next(line for line in result.stderr.splitlines() if "seconds: " in line)
    phases = {"reading the headers", "loading the whole model", "sampling the model", "embedding", "calibration passes"}
    phases |= {"structure of the layers", "permutations", "masks and weights", "block training", "writing"}
    assert all(phase in seconds for phase in phases)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "absent.json"], "absent.json"),
        (["--samples", "0"], "--samples 0"),
        (["--ignore", "proj"], "nothing is left to prune"),
        (["--max-shard-size", "big"], "size 'big'"),
        (["--data", "absent.txt"], "no such file"),
    ],
)
def test_options_that_make_no_sense(options, message, tiny, text, tmp_path):
    common = ["--data", text, "--samples", 4, "--seq-len", 32]
    result = invoke(tiny("llama"), "-o", tmp_path / "out", *common, *options)
    assert isinstance(result.exception, RiaError) and message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [None, "64", "row"])
def test_options_of_integers(size, tiny, text, tmp_path):
    options = ["--data", text, "--samples", 2, "--seq-len", 32, "--reconstruct", "none"]
    options += ["--scheme", "w4a8", *(["--group-size", size] if size else [])]
    result = invoke(tiny("llama"), "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert ("--group-size 32: what fits the in-features" in result.stderr) == (size is None)
    schema = Reader(tmp_path / "out").schema
    assert schema.weight_format.name == {"row": "int4", "64": "int4-g64", None: "int4-g32"}[size]
    assert schema.input_dtype == torch.int8


def test_a_saved_recipe_is_repeated_but_for_what_is_given(tiny, text, tmp_path):
    common = [tiny("llama"), "--data", text]
    first = ["--scheme", "W4A16", "--group-size", 32, "--samples", 3, "--seq-len", 32, "--reconstruct", "none"]
    first += ["--permute", "none", "--ignore", "0.*q_proj", "--seed", 4]
    assert invoke(*common, "-o", tmp_path / "one", *first).exit_code == 0
    again = ["--recipe", tmp_path / "one" / "ria_report.json"]
    found = {"one": Reader(tmp_path / "one").schema.recipe}
    other = {"faster": ["--effort", "fast"], "fewer": ["--samples", 2], "rounded": ["--scheme", "W8A8"]}
    for name, given in {"same": [], **other}.items():
        result = invoke(*common, "-o", tmp_path / name, *again, *given)
        assert result.exit_code == 0, result.output
        found[name] = Reader(tmp_path / name).schema.recipe
    assert not found["one"]["topology"][0]["migrations"] and found["rounded"].pop("topology")[0]["migrations"]
    changed = {
        name: {key: value for key, value in recipe.items() if value != found["one"][key]}
        for name, recipe in found.items()
    }
    assert changed["same"] == {} and changed["fewer"] == {"samples": 2}
    rounded = {"scheme": "W8A8", "group_size": None, "smooth": 0.5}  # as without a recipe
    assert changed["rounded"] == rounded
    assert changed["faster"] == {"reconstruct": "admm", "samples": 32, "seq_len": 128, "held_out": 8}


@pytest.mark.parametrize(("command", "options"), [(compress, ()), (distill, ("--teacher", "dense", "--tokens", "2"))])
def test_under_torchrun_nothing_is_begun(command, options, tiny, tmp_path):
    arguments = [str(tiny("llama")), "-o", str(tmp_path / "out"), *options]
    result = CliRunner(env={"WORLD_SIZE": "2"}).invoke(command, arguments)
    assert isinstance(result.exception, RiaError) and list(tmp_path.iterdir()) == []
    assert str(result.exception) == f"{command.name} runs in one process: start it without torchrun."

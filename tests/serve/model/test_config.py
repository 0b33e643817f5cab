"""Whatever is changed in a folder, the right permutations are read from it, or an error names what is wrong."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from mutations import Damaged, damaged, examples, other_run
from vllm.platforms import current_platform

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.serve.model import config
from ria_vllm.serve.model.config import RiaConfig


@pytest.fixture(scope="module")
def other(pruned_llama, tmp_path_factory) -> Path:
    return other_run(pruned_llama.folder, tmp_path_factory.mktemp("other") / "run")


def test_a_pattern_that_gpus_cannot_multiply_is_refused_there_before_anything_is_loaded(monkeypatch):
    wide = {"quant_method": "ria", "sparsity_config": {"sparsity_structure": "8:16"}}
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(config, "folder_of", pytest.fail)
    with pytest.raises(RiaError, match=r"^OUT is pruned to 8:16, .*compress --pattern 2:4`.*RIA_VLLM_DENSE=1"):
        RiaConfig.from_config(wide).maybe_update_config("OUT")
    monkeypatch.setenv("RIA_VLLM_DENSE", "1")
    with pytest.raises(pytest.fail.Exception, match="OUT"):  # it goes on to the folder
        RiaConfig.from_config(wide).maybe_update_config("OUT")


@given(case=damaged)
@examples(150)
def test_the_configuration_is_right_or_refused(pruned_llama, other, case: Damaged):
    with tempfile.TemporaryDirectory() as place:
        folder = case.make(pruned_llama.folder, other, Path(place) / "x")
        try:
            quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
            ours = quantization["quant_method"] == "ria"
        except (OSError, ValueError, LookupError, TypeError):
            return  # vLLM itself cannot read it
        if not ours:
            return
        try:
            config = RiaConfig.from_config(quantization)
            config.maybe_update_config(str(folder), SimpleNamespace(model_type="llama"))
        except RiaError:
            return
        try:
            expected = Reader(folder).permutations
        except RiaError:
            return  # damage that the loader of the weights will find
        assert set(config.permutations) == set(expected)
        assert all(torch.equal(torch.from_numpy(config.permutations[name]), p.int()) for name, p in expected.items())

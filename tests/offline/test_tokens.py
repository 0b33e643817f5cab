"""The calibration tokens that the dense model writes itself: in what dtype, and the errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressing import run_small
from safetensors.torch import load_file

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration import written
from ria_vllm.offline.model.run import dtypes
from ria_vllm.offline.run import tokens


def test_the_model_writes_its_text_in_the_fast_dtype(make_model, tmp_path, monkeypatch):
    """On a CPU without instructions for bfloat16."""
    monkeypatch.setattr(dtypes, "_cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    seen = []
    from_model = written.from_model
    monkeypatch.setattr(
        written, "from_model", lambda model, *rest: (seen.append(model.dtype), from_model(model, *rest))[1]
    )
    run_small(model, tmp_path / "out", "self")
    assert seen == [torch.float32]
    with pytest.raises(RiaError, match="in float32"):
        monkeypatch.setattr(tokens, "available", lambda device: (model / "model.safetensors").stat().st_size)
        run_small(model, tmp_path / "again", "self")


def test_a_configuration_that_names_no_first_token(tiny_wrapper, tmp_path):
    """GLM-4V's has none, and its class no default."""
    source = Path(shutil.copytree(tiny_wrapper("glm4v"), tmp_path / "in"))
    config = json.loads((source / "config.json").read_text())
    del config["text_config"]["bos_token_id"]
    (source / "config.json").write_text(json.dumps(config))
    report, _ = run_small(source, tmp_path / "out", "self")
    assert len(report["linears"]) > 10


def test_sampling_a_model_that_does_not_fit_is_refused(tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    size = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    monkeypatch.setattr(tokens, "available", lambda device: size - 1)
    with pytest.raises(RiaError, match="--data self runs the whole dense model.*Give a text file"):
        run_small(model, tmp_path / "out", "self")
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(tokens, "available", lambda device: size)
    run_small(model, tmp_path / "out", "self")


def test_a_model_with_a_chat_template_answers_prompts(make_model, tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", "llama")
    asked, from_model = [], written.from_model
    monkeypatch.setattr(written, "from_model", lambda *args: (asked.append(args[-1]), from_model(*args))[1])
    plain, _ = run_small(model, tmp_path / "plain", "self")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report, _ = run_small(model, tmp_path / "out", "self", seq_len=64)
    assert asked[0] is None and len(asked[1].asked) == 500
    assert plain["recipe"]["written"] == {"temperature": 1.0, "prompts": 0}
    short = sum(len(one) <= 32 for one in asked[1].asked)  # half of a document
    assert report["recipe"]["written"] == {"temperature": 1.0, "prompts": short} and 0 < short <= 500

"""Killed and resumed: the same bytes as in one uninterrupted run."""

import errno
import json
import os
import time
from pathlib import Path

import preloaded
import pytest
from compressing import digests, edit_config, interrupted_after_a_layer
from transformers.utils import logging

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run import streaming
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor


def command(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    fixed = ["--data", str(text), "--samples", "20", "--seq-len", "128"]
    return ["compress", str(model), "-o", str(out), *fixed, *options]


def run(model: Path, out: Path, text: Path, settings: Settings = Settings(), **options) -> None:
    recipe = Recipe(**{"calibration": str(text), "samples": 8, "seq_len": 64} | options)
    compress(str(model), out, recipe, settings, Monitor(shown=False))


def test_a_resumed_run_keeps_what_was_found_out_about_the_layers(model, text, tmp_path, monkeypatch):
    """Whatever experiments say on a machine with less memory: two layers with other heads could not be folded."""
    run(model, tmp_path / "whole", text)
    with interrupted_after_a_layer():
        run(model, tmp_path / "out", text)
    monkeypatch.setattr("ria_vllm.offline.calibration.embed.survey", None)
    run(model, tmp_path / "out", text, Settings(resume=True))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_writes_the_same_bytes(make_model, text, tmp_path):
    model = make_model(tmp_path / "in", "llama", num_hidden_layers=6)
    log = tmp_path / "log"
    preloaded.run(log, preloaded.ria_vllm, *command(model, tmp_path / "whole", text))
    out, units = tmp_path / "killed", tmp_path / "killed.partial" / "units"
    for seen in (1, 3, 5):
        with preloaded.started(log, preloaded.ria_vllm, *command(model, out, text, "--resume")) as (process,):
            while process.is_alive() and len(list(units.glob("layer-*.safetensors"))) < seen:
                time.sleep(0.002)
        assert not out.exists()
    printed = preloaded.run(tmp_path / "last", preloaded.ria_vllm, *command(model, out, text, "--resume"))
    assert "resuming: " in printed
    assert digests(tmp_path / "whole") == digests(out)
    assert not units.parent.exists()


WAYS = [
    {},
    {"reconstruct": "block", "weights": "int8", "group_size": 32},
    {"weights": "int4", "activations": "int8", "smooth": 0.5},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [("gemma3", WAYS[0]), ("phi3", WAYS[1]), ("gpt-neox", WAYS[2])],
    ids=str,
)
def test_stopped_after_a_layer_and_resumed_it_writes_the_same_bytes(family, options, tiny, text, tmp_path):
    run(tiny(family), tmp_path / "whole", text, **options)
    with interrupted_after_a_layer():
        run(tiny(family), tmp_path / "out", text, **options)
    assert not (tmp_path / "out").exists()
    run(tiny(family), tmp_path / "out", text, Settings(resume=True), **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")


def test_what_layers_read_of_earlier_ones_is_there_again(tiny, text, tmp_path):
    """Stopped where the keys and values of the first layer are left."""
    family, options = "gemma4-e2b", WAYS[2]
    run(tiny(family), tmp_path / "whole", text, samples=40, **options)
    with interrupted_after_a_layer():
        run(tiny(family), tmp_path / "out", text, samples=40, **options)
    run(tiny(family), tmp_path / "out", text, Settings(resume=True), samples=40, **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")
    assert list(Reader(tmp_path / "out").problems()) == []


def test_resume_refuses_other_options(tiny, text, tmp_path):
    with interrupted_after_a_layer():
        run(tiny("llama"), tmp_path / "out", text)
    with pytest.raises(RiaError, match="another method"):
        run(tiny("llama"), tmp_path / "out", text, Settings(resume=True), method="wanda")
    run(tiny("llama"), tmp_path / "out", text, Settings(resume=True))


def test_resume_says_what_was_upgraded_and_what_is_damaged(tiny, text, tmp_path):
    with interrupted_after_a_layer():
        run(tiny("llama"), tmp_path / "out", text)
    path = tmp_path / "out.partial" / "run.json"
    begun = path.read_text()
    content = json.loads(begun)
    now = content["versions"]["scipy"]
    path.write_text(json.dumps(content | {"versions": content["versions"] | {"scipy": "1.0"}}))
    with pytest.raises(RiaError, match=f"from a run with scipy 1.0; here it is scipy {now}. .*leave out --resume"):
        run(tiny("llama"), tmp_path / "out", text, Settings(resume=True))
    path.write_text(begun[:40])
    with pytest.raises(RiaError, match="run.json is damaged.* Leave out --resume"):
        run(tiny("llama"), tmp_path / "out", text, Settings(resume=True))
    path.write_text(begun)
    logging.enable_progress_bar()
    run(tiny("llama"), tmp_path / "out", text, Settings(resume=True))
    assert not logging.is_progress_bar_enabled()


def test_the_fingerprint_of_a_run_is_written_whole_or_not_at_all(tiny, text, tmp_path, monkeypatch):
    def write(path, content, **_):
        path.write_bytes(content.encode()[:20])
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        with pytest.raises(RiaError, match="cannot write"):
            run(tiny("llama"), tmp_path / "out", text)
    assert not (tmp_path / "out.partial" / "run.json").exists()
    run(tiny("llama"), tmp_path / "out", text, Settings(resume=True))


def test_resume_refuses_other_weights_and_other_text(make_model, text, tmp_path):
    model, words = make_model(tmp_path / "model", "llama"), tmp_path / "words.txt"
    words.write_bytes(text.read_bytes())
    with interrupted_after_a_layer():
        run(model, tmp_path / "out", words)
    weights = model / "model.safetensors"
    content, status = weights.read_bytes(), weights.stat()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RiaError, match="another state of the model"):
        run(model, tmp_path / "out", words, Settings(resume=True))
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    words.write_text("other " * 3000)
    with pytest.raises(RiaError, match="another state of the calibration text"):
        run(model, tmp_path / "out", words, Settings(resume=True))


@pytest.mark.parametrize(
    "changes", [{"rms_norm_eps": 0.1}, {"quantization_config": {"quant_method": "mxfp4"}}], ids=str
)
def test_resume_refuses_another_configuration(changes, make_model, text, tmp_path):
    """The weights are the same. The quantization is not in what is written."""
    model = make_model(tmp_path / "model", "llama")
    with interrupted_after_a_layer():
        run(model, tmp_path / "out", text)
    content = (model / "config.json").read_text()
    edit_config(model, **changes)
    with pytest.raises(RiaError, match="from a run with another config.json. Give the same one, or leave out --resume"):
        run(model, tmp_path / "out", text, Settings(resume=True))
    (model / "config.json").write_text(json.dumps(json.loads(content)))  # the same, written otherwise
    run(model, tmp_path / "out", text, Settings(resume=True))


def test_a_model_unreachable_for_a_moment_costs_no_finished_layer(make_model, text, tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", "llama")
    run(model, tmp_path / "whole", text)
    with interrupted_after_a_layer():
        run(model, tmp_path / "out", text)

    weights, gone = model / "model.safetensors", tmp_path / "gone"

    def out_of_reach(self, index):
        if weights.is_file():
            weights.rename(gone)
        return load_layer(self, index)

    load_layer = streaming.StreamedModel.load_layer
    with monkeypatch.context() as patch:
        patch.setattr(streaming.StreamedModel, "load_layer", out_of_reach)
        with pytest.raises(RiaError, match="model/model.safetensors: cannot be read .*--resume"):
            run(model, tmp_path / "out", text, Settings(resume=True))
    gone.rename(weights)
    assert (tmp_path / "out.partial" / "units" / "layer-00000.safetensors").is_file()
    run(model, tmp_path / "out", text, Settings(resume=True))
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")

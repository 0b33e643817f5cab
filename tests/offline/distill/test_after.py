"""compress --distill."""

import pytest
from click.testing import CliRunner

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.commands import compress


def run(model, out, text, *options: str) -> None:
    fixed = ["--calibration", str(text), "--samples", "4", "--seq-len", "32", "--reconstruct", "none"]
    CliRunner().invoke(compress, [str(model), "-o", str(out), *fixed, *options], catch_exceptions=False)


def test_what_was_pruned_is_trained_and_only_the_result_stays(tiny, text, tmp_path):
    run(tiny("llama"), tmp_path / "pruned", text)
    run(tiny("llama"), tmp_path / "out", text, "--distill", "512")
    before, after = Reader(tmp_path / "pruned"), Reader(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pruned"]
    (story,) = after.schema.recipe["distill"]
    assert story["tokens"] == 512 and story["text"] == text.name
    for name in before.sparse_names:
        one, other = before.linear(name), after.linear(name)
        assert (one.parts["bitmask"] == other.parts["bitmask"]).all()
        assert not (one.parts["compressed"] == other.parts["compressed"]).all()


def test_interrupted_in_training_it_does_not_prune_again(tiny, text, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(tiny("llama"), whole, text, "--distill", "512")
    with monkeypatch.context() as patch:
        patch.setattr("ria_vllm.offline.distill.train.Training._step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny("llama"), out, text, "--distill", "512")
    monkeypatch.setattr("ria_vllm.offline.compress.compress", lambda *_: 1 / 0)
    with pytest.raises(RiaError, match="another exponent"):
        run(tiny("llama"), out, text, "--distill", "512", "--resume", "--exponent", "1")
    run(tiny("llama"), out, text, "--distill", "512", "--resume")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_other_patterns_are_refused(tiny, text, tmp_path):
    with pytest.raises(RiaError, match="--distill is for the pattern 2:4"):
        run(tiny("llama"), tmp_path / "out", text, "--distill", "512", "--pattern", "4:8")
    assert list(tmp_path.iterdir()) == []

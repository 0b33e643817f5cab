"""FP8 from `compress` to every reader. The oracle: the values of e4m3 by its definition, and float64."""

import e4m3
import pytest
import torch
from compressing import interrupted_after_a_layer, run_small, weight_digests
from safetensors.torch import load_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import SCHEMES
from ria_vllm.offline.run import budget
from ria_vllm.offline.run.budget import Choice
from ria_vllm.offline.run.compress import Settings

FP8 = SCHEMES["FP8"]


@pytest.fixture(scope="module")
def folder(tiny, text, tmp_path_factory):
    """Do not write into it."""
    out = tmp_path_factory.mktemp("fp8") / "out"
    run_small(tiny("llama"), out, text, method="magnitude", **FP8)
    return out


def test_each_weight_is_the_nearest_value_times_its_scale(folder, tiny, text, tmp_path):
    run_small(tiny("llama"), tmp_path / "exact", text, method="magnitude")
    exact, reader, tensors = Reader(tmp_path / "exact"), Reader(folder), load_file(folder / "model.safetensors")
    assert list(reader.problems()) == [] and reader.sparse_names == exact.sparse_names
    assert reader.dense_names == exact.dense_names  # the head, too, which is not rounded
    for name in reader.sparse_names:
        want, values, scale = exact.linear(name), tensors[f"{name}.compressed"], tensors[f"{name}.weight_scale"]
        assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (len(values), 1)
        assert torch.equal(want.parts["bitmask"], reader.linear(name).parts["bitmask"])
        scaled = want.parts["compressed"].double() / scale.double()
        best = (e4m3.nearest(scaled) - scaled).abs()
        inside = scaled.abs() <= 448  # scales are chosen by error, and may cut the largest
        assert ((values.double() - scaled).abs() - best)[inside].max() < 1e-4 and inside.double().mean() > 0.95, name
        assert (values.double()[~inside].abs() == 448).all() and values.float().abs().amax(1).min() > 100


@pytest.mark.parametrize(
    "options", [{"reconstruct": "short", "samples": 8, "smooth": 0.5}, {"reconstruct": "admm"}], ids=str
)
def test_rounding_makes_up_for_itself_and_resumes(options, tiny, text, tmp_path):
    report, warnings = run_small(tiny("llama"), tmp_path / "out", text, **FP8, **options)
    assert list(Reader(tmp_path / "out").problems()) == []
    assert all("keep the weights that ADMM gave them" in warning for warning in warnings)  # processors differ
    if options["reconstruct"] == "short":
        # Rounded to the nearest, a uniform mantissa of three bits loses 2.6%, squared.
        assert 0 < max(record["rounding_error"] for record in report["linears"].values()) < 0.03
    with interrupted_after_a_layer():
        run_small(tiny("llama"), tmp_path / "again", text, **FP8, **options)
    run_small(tiny("llama"), tmp_path / "again", text, Settings(resume=True), **FP8, **options)
    assert weight_digests(tmp_path / "again") == weight_digests(tmp_path / "out")


def test_what_max_loss_leaves_dense_stays_in_the_models_dtype(tiny, text, tmp_path, monkeypatch):
    options = FP8 | {"reconstruct": "admm", "samples": 8, "max_loss": 0.1}
    monkeypatch.setattr(budget, "choose", lambda *_: Choice(frozenset({(0, "mlp")}), {}))
    report, _ = run_small(tiny("llama"), tmp_path / "out", text, **options)
    reader = Reader(tmp_path / "out")
    assert len(reader.sparse_names) == 3 and reader.int8_names == [] and "dense_in_int8" not in report
    source = load_file(tiny("llama") / "model.safetensors")
    assert all(torch.equal(reader.tensor(name), source[name]) for name in reader.dense_names)
    none = {"perplexity": 2.0, "perplexity_dense": 1.0}
    monkeypatch.setattr(budget, "choose", lambda *_: Choice(frozenset(), {1: none}))
    with pytest.raises(RiaError, match="every sublayer loses more; the one that costs least, 100.0%"):
        run_small(tiny("llama"), tmp_path / "none", text, **options)

"""Text of which the dense model writes a part."""

import pytest
import torch
from compressing import run_small

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.run import compress as compressing
from ria_vllm.offline.run import tokens
from ria_vllm.offline.self_written import spread_among


@pytest.fixture
def read(monkeypatch):
    """The calibration tokens of the runs so far."""
    found, whole = [], compressing.calibration_tokens
    monkeypatch.setattr(
        compressing, "calibration_tokens", lambda *given: (found.append(whole(*given)), found[-1].clone())[1]
    )
    return found


@pytest.mark.parametrize(("drawn", "written"), [(3, 1), (50, 50), (1, 6), (67, 31)])
def test_windows_of_the_teacher_are_spread_evenly_and_in_order(drawn, written):
    total = drawn + written
    of_text, of_teacher = torch.arange(drawn).repeat(2, 1).T.int(), -1 - torch.arange(written).repeat(2, 1).T
    found = spread_among(of_text, of_teacher)
    assert found.dtype == torch.int32 and torch.equal(found[found[:, 0] >= 0], of_text)
    assert torch.equal(found[found[:, 0] < 0], of_teacher.int())
    for end in range(1, total + 1):
        assert abs(int((found[:end, 0] < 0).sum()) - end * written / total) < 1


def test_the_dense_model_writes_a_share_of_the_samples(tiny, text, tmp_path, read):
    kinds = {"drawn": (text, {"samples": 6}), "written": ("self", {"samples": 2})}
    for name, (source, options) in (kinds | {"mixed": (text, {"samples": 8, "self_written": 0.25})}).items():
        run_small(tiny("llama"), tmp_path / name, source, **options)
    drawn, written, mixed = read
    assert mixed.dtype == torch.int64 and torch.equal(mixed[3::4], written)
    assert torch.equal(mixed.view(2, 4, -1)[:, :3].flatten(0, 1), drawn)
    recipe = Reader(tmp_path / "mixed").schema.recipe
    assert (recipe["calibration"], recipe["self_written"], recipe["samples"]) == (text.name, 0.25, 8)
    assert len(recipe["calibration_sha256"]) == 64


def test_a_model_that_does_not_fit_into_memory_writes_nothing(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "available", lambda device: 10)
    with pytest.raises(RiaError, match="--self-written runs the whole dense model.* Leave it out; then"):
        run_small(tiny("llama"), tmp_path / "out", text, self_written=0.5)

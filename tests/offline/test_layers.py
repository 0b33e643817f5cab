"""The pass over the decoder layers."""

from inspect import signature

import pytest

from ria_vllm.offline import solve, train
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.pruning.rounding import PASSES
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_measuring_rounds_in_one_pass_and_pruning_in_all(family, tiny, text, tmp_path, monkeypatch):
    passes, round_on_mask = [], solve.round_on_mask
    given = signature(round_on_mask)

    def watched(*args, **kwargs):
        passes.append(given.bind(*args, **kwargs).arguments.get("passes", PASSES))
        return round_on_mask(*args, **kwargs)

    for module in (solve, train):  # what is trained is rounded after that
        monkeypatch.setattr(module, "round_on_mask", watched)
    recipe = Recipe(calibration=str(text), samples=4, seq_len=32, weights="int4", group_size=32, skip_sensitive=0.2)
    compress(str(tiny(family)), tmp_path / "out", recipe, Settings(), Monitor(shown=False))
    measured = passes.count(1)
    assert passes == [1] * measured + [PASSES] * (len(passes) - measured)
    assert 0 < len(passes) - measured < measured  # the most sensitive stay dense

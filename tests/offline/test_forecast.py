"""The tables of docs/compress.md: what `forecast` says of large models, from their shapes alone."""

from pathlib import Path

import pytest
from compressing import WarningRecorder, interrupted_after_a_layer

from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import forecast
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.run.layers import LayerPass

PAGE = Path(__file__).parents[2] / "docs" / "compress.md"


@pytest.mark.parametrize(
    ("options", "taken"), [({}, "20 min"), ({"max_loss": 1.0}, "40 min"), ({"seed": 1}, "10 min from there on")]
)
def test_once_a_layer_is_pruned_the_time_is_as_measured(options, taken, tiny, text, tmp_path, monkeypatch):
    """Two layers that are alike, in ten minutes each by a clock that stands still otherwise."""
    now, prune, resumed = [0.0], LayerPass.prune, "seed" in options

    def slowly(*arguments):
        now[0] += 600
        return prune(*arguments)

    monitor = WarningRecorder(clock=lambda: now[0])
    recipe = Recipe(calibration=str(text), samples=4, seq_len=32, reconstruct="admm", **options)
    arguments = (str(tiny("llama")), tmp_path / "out", recipe)
    if resumed:
        with interrupted_after_a_layer():
            compress(*arguments, Settings(is_half=True), WarningRecorder())
    monkeypatch.setattr(LayerPass, "prune", slowly)
    monkeypatch.setattr(forecast, "distilling_seconds", lambda *_: 7200.0)
    compress(*arguments, Settings(is_half=True, resume=resumed), monitor)
    (said,) = [line for line in monitor.said if line.startswith("as measured")]
    wanted = f"as measured on layer {int(resumed)}, pruning takes about {taken}, and distilling, as estimated, 2.0 h"
    assert said == wanted

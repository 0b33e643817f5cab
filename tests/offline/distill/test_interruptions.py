"""Runs that stop before their end: resumed, they write the bytes of an uninterrupted one; nothing broken is kept."""

import random
import shutil
import time
from pathlib import Path

import preloaded
import pytest
from compressing import digests, edit_config
from distilling import command, has_reached, run, stop_at

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.run import Settings
from ria_vllm.offline.distill.student.parameters import TrainedParameter
from ria_vllm.offline.distill.train import Training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text": "self"},
        {"self_written": 0.5},
    ],
    ids=str,
)
def test_stopped_after_any_step_and_resumed_it_writes_the_same_bytes(options, pruned, text, tmp_path, monkeypatch):
    dense, folder = pruned(weights="int8")
    more = options | {"eval_text": (str(text),), "eval_tokens": 256}
    run(dense, folder, tmp_path / "whole", text, **more)
    step = Training._step
    for stop in (1, 4, 5):

        def stopping(self, number, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return step(self, number)

        monkeypatch.setattr(Training, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(dense, folder, tmp_path / "out", text, Settings(save_every=0, resume=True), **more)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Training, "_step", step)
    run(dense, folder, tmp_path / "out", text, Settings(resume=True), **more)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("held_out", [False, True])
def test_stopped_while_it_writes_the_result_and_resumed_it_writes_the_same_bytes(
    held_out, pruned, text, tmp_path, monkeypatch
):
    """It does not train again, and needs no parameters for it."""
    dense, folder = pruned(weights="int8")
    more = {"eval_text": (str(text),), "eval_tokens": 256} if held_out else {}
    run(dense, folder, tmp_path / "whole", text, **more)
    with monkeypatch.context() as patch:
        patch.setattr("ria_vllm.offline.distill.run.CheckpointWriter.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(dense, folder, tmp_path / "out", text, **more)
    left = [path.stem for path in (tmp_path / "out.partial" / "units").iterdir()]
    assert "state" in left and not [key for key in left if key.startswith("state-")]
    monkeypatch.setattr(Training, "_step", lambda *_: 1 / 0)
    run(dense, folder, tmp_path / "out", text, Settings(resume=True), **more)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_writes_the_same_bytes(pruned, text, tmp_path):
    """`kill -9` somewhere in or after each of three steps, one of which is the first that is kept as the best."""
    dense, folder = pruned()
    log = tmp_path / "log"
    preloaded.run(log, preloaded.ria_vllm, *command(dense, folder, tmp_path / "whole", text))
    out, units = tmp_path / "killed", tmp_path / "killed.partial" / "units"
    again = command(dense, folder, out, text, "--resume")
    for kind, step in (("state", random.randint(1, 3)), ("best", 4), ("state", random.randint(7, 10))):
        later = random.uniform(0.0, 0.03)
        print(f"killed {later} s after {kind} {step}")
        with preloaded.started(log, preloaded.ria_vllm, *again) as (process,):
            while process.is_alive() and not has_reached(units, f"{kind}-*", step):
                time.sleep(0.002)
            time.sleep(later)
        assert not out.exists()
    preloaded.run(log, preloaded.ria_vllm, *again)
    assert digests(tmp_path / "whole") == digests(out)
    assert not units.parent.exists()


def test_a_gradient_that_is_not_a_number_stops_the_run_and_nothing_of_it_is_kept(pruned, text, tmp_path, monkeypatch):
    """The loss is finite in that step; what was saved before it stays, and is what a new run goes on from."""
    dense, folder = pruned()
    run(dense, folder, tmp_path / "whole", text)
    step = TrainedParameter._step

    def broken(self, gradient):
        if self.pace.number == 3:
            gradient.view(-1)[0] = float("nan")
        return step(self, gradient)

    monkeypatch.setattr(TrainedParameter, "_step", broken)
    with pytest.raises(RiaError, match=r"step 3: training diverged \(a gradient is not finite\).*--resume"):
        run(dense, folder, tmp_path / "out", text, Settings(save_every=0))
    monkeypatch.setattr(TrainedParameter, "_step", step)
    run(dense, folder, tmp_path / "out", text, Settings(resume=True))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_weights_that_are_not_numbers_are_not_written(pruned, text, tmp_path, monkeypatch):
    dense, folder = pruned()
    put = TrainedParameter._step

    def broken(self, gradient):
        put(self, gradient)
        if self.pace.number == 8:  # the last, after which nothing measures a loss
            self.values[0] = float("nan")

    monkeypatch.setattr(TrainedParameter, "_step", broken)
    with pytest.raises(RiaError, match="step 8: training diverged .*not finite"):
        run(dense, folder, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_teacher_has_another_configuration_by_now_is_not_resumed(pruned, text, tmp_path, monkeypatch):
    dense, folder = pruned()
    teacher = Path(shutil.copytree(dense, tmp_path / "dense"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Training, "_step", lambda *_: 1 / 0)
        run(teacher, folder, tmp_path / "out", text)
    edit_config(teacher, rope_theta=5000.0)
    with pytest.raises(RiaError, match="from a run with another state of the teacher"):
        run(teacher, folder, tmp_path / "out", text, Settings(resume=True))


def test_another_run_is_not_resumed(pruned, text, tmp_path, monkeypatch):
    dense, folder = pruned()
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(dense, folder, tmp_path / "out", text, Settings(save_every=0))
    with pytest.raises(RiaError, match=r"is from a run with another lr \(0.0001\)"):
        run(dense, folder, tmp_path / "out", text, Settings(resume=True), lr=2e-4)

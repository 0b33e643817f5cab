"""compress --distill after an error in training, beside files of others, and beside another process."""

import os
import re
import shlex
import sys
from contextlib import suppress

import preloaded
import pytest
from click.testing import CliRunner

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import locked
from ria_vllm.errors import RiaError
from ria_vllm.offline.commands import compress
from ria_vllm.offline.distill import after
from ria_vllm.offline.distill.command import distill
from ria_vllm.offline.distill.parameters import diverged
from ria_vllm.progress import Monitor


def arguments(model, out, text, *options: str) -> list[str]:
    fixed = ["--calibration", str(text), "--samples", "4", "--seq-len", "32", "--reconstruct", "none"]
    return [str(model), "-o", str(out), *fixed, *options]


def run(model, out, text, *options: str) -> str:
    """What is said."""
    return CliRunner().invoke(compress, arguments(model, out, text, *options), catch_exceptions=False).output


def test_an_error_names_a_command_that_trains_otherwise_without_pruning_again(tiny, text, tmp_path, monkeypatch):
    out, pruned = tmp_path / "the out", tmp_path / "the out.pruned" / "model"
    same = ("--seed", "7", "--compute-dtype", "float32", "--eval-text", str(text))

    def steps(*_):
        raise diverged(1, "loss nan")

    with monkeypatch.context() as patch:
        patch.setattr("ria_vllm.offline.distill.train.Training._step", steps)
        with pytest.raises(RiaError, match="Give a smaller --lr.* without --resume does.* such as --lr, use") as error:
            run(tiny("llama"), out, text, "--distill", "512", *same)
    monkeypatch.setattr("ria_vllm.offline.run.compress.compress", lambda *_: 1 / 0)
    with pytest.raises(RiaError, match="another tokens .512.* without --resume does") as resumed:
        run(tiny("llama"), out, text, "--distill", "256", *same, "--resume")
    commands = [re.search("`(ria-vllm .*)`", str(one.value))[1] for one in (error, resumed)]
    assert commands[1] == commands[0].replace("512", "256")
    program, name, *same = shlex.split(commands[0])
    assert (program, name) == ("ria-vllm", "distill")
    before = Reader(pruned)
    CliRunner().invoke(distill, [*same, "--lr", "1e-4"], catch_exceptions=False)
    trained = Reader(out)
    wanted = {"lr": 1e-4, "tokens": 512, "seq_len": 32, "seed": 7, "compute_dtype": "float32", "text": text.name}
    assert trained.schema.recipe["distill"][0].items() >= (wanted | {"eval_text": [text.name]}).items()
    assert trained.sparse_names == before.sparse_names


def test_files_of_others_beside_the_pruned_model_stay_with_a_warning(tiny, text, tmp_path, monkeypatch):
    out, place = tmp_path / "out", tmp_path / "out.pruned"
    real = after.distill

    def trained(*given):
        (place / ".DS_Store").write_text("mine")
        (place / "notes").mkdir()
        return real(*given)

    monkeypatch.setattr(after, "distill", trained)
    warnings = []
    monkeypatch.setattr("ria_vllm.progress.Monitor.warn", lambda _, line: warnings.append(line))
    run(tiny("llama"), out, text, "--distill", "512")
    assert "distill" in Reader(out).schema.recipe
    assert sorted(path.name for path in place.iterdir()) == [".DS_Store", "notes"]
    assert [line for line in warnings if "also holds" in line and line.endswith(".DS_Store, notes.")]


@pytest.mark.parametrize("options", [(), ("--resume",)], ids=str)
def test_a_second_process_is_refused_while_the_first_one_trains(options, tiny, text, tmp_path, monkeypatch):
    """It would delete the pruned model that the first one reads, or that it could resume from."""
    out, log, real = tmp_path / "out", tmp_path / "log", after.distill
    second = ["compress", *arguments(tiny("llama"), out, text, "--distill", "512", *options)]

    def trained(*given):
        with preloaded.started(log, preloaded.ria_vllm, *second) as (process,):
            process.join(preloaded.TIMEOUT)
            assert process.exitcode == 2, log.read_text()
        return real(*given)

    monkeypatch.setattr(after, "distill", trained)
    run(tiny("llama"), out, text, "--distill", "512")
    assert f"{out}.pruned: another process is writing here. Wait until it ends" in log.read_text()
    assert "distill" in Reader(out).schema.recipe and not (tmp_path / "out.pruned").exists()


def test_a_run_that_was_killed_as_it_began_is_not_taken_for_files_of_others(tiny, text, tmp_path):
    (tmp_path / "out.pruned").mkdir()
    (tmp_path / "out.pruned" / "lock").touch()
    run(tiny("llama"), tmp_path / "out", text, "--distill", "512")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_folder_has_no_other_owner_before_it_is_empty(tmp_path):
    """Who locks the file that is about to be deleted would have the folder beside who comes next."""
    place, refused, here = tmp_path / "out.pruned", [], os.getpid()

    def hook(event, arguments):
        if event == "os.remove" and arguments[0] == str(place / "lock") and os.getpid() == here:
            child = os.fork()
            if not child:
                with suppress(RiaError):
                    locked(place)
                    os._exit(1)
                os._exit(0)
            refused.append(os.waitpid(child, 0)[1] == 0)

    sys.addaudithook(hook)
    with after._begun(place, {"exponent": 1}, resume=False) as lock:
        (place / "model").mkdir()
        after._delete(place, lock, Monitor(shown=False))
    assert refused == [True] and not place.exists()


def test_a_run_that_was_killed_as_it_wrote_what_it_is_can_be_begun_again(tmp_path):
    place = tmp_path / "out.pruned"
    place.mkdir()
    for name in ("lock", f"{after.RUN_FILE}.tmp"):
        (place / name).touch()
    after._check_ours(place)
    with after._begun(place, {"exponent": 1}, resume=True) as lock:
        assert sorted(path.name for path in place.iterdir()) == ["lock", after.RUN_FILE]
        after._delete(place, lock, Monitor(shown=False))
    assert not place.exists()

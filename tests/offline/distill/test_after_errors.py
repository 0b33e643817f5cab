"""compress --distill after an error in training, beside files of others, and beside another process."""

import re
import shlex

import preloaded
import pytest
from click.testing import CliRunner

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.commands import compress
from ria_vllm.offline.distill import after
from ria_vllm.offline.distill.command import distill
from ria_vllm.offline.distill.parameters import diverged


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
    monkeypatch.setattr("ria_vllm.offline.compress.compress", lambda *_: 1 / 0)
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

"""What is refused or warned of before the first step, and what the model card says of the steps."""

import json
import shutil
from pathlib import Path

import pytest
from compressing import WarningRecorder, edit_config, run_small
from distilling import run

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.report import recovery_section
from ria_vllm.offline.distill.text import check_texts
from ria_vllm.offline.distill.train import Training
from ria_vllm.offline.run.compress import Settings


def recipe(text: Path | str, *held_out: Path) -> Distillation:
    return Distillation(tokens=1024, text=str(text), eval_text=tuple(map(str, held_out)))


@pytest.fixture
def texts(tmp_path) -> tuple[Path, Path]:
    """Two that are as long as each other, in a folder OUT."""
    found = (tmp_path / "OUT" / "one.txt", tmp_path / "OUT" / "texts" / "two.txt")
    found[1].parent.mkdir(parents=True)
    for path in found:
        path.write_text(path.stem)
    return found


def test_texts_in_the_folder_that_is_replaced_are_refused(texts, tmp_path, monkeypatch):
    """--overwrite would delete them."""
    one, two = texts
    for wanted, refused in ((recipe(one), one), (recipe("self", two), two)):
        with pytest.raises(RiaError, match=str(refused)):
            check_texts(tmp_path / "OUT", wanted, WarningRecorder())
    (tmp_path / "self").mkdir()
    monkeypatch.chdir(tmp_path)
    check_texts(Path("self"), recipe("self", two), WarningRecorder())  # no file, but what the teacher writes


def test_compress_refuses_them_too(tiny, text, tmp_path):
    out = tmp_path / "OUT"
    out.mkdir()
    mine = shutil.copy(text, out / "mine.txt")
    with pytest.raises(RiaError, match=str(mine)):
        run_small(tiny("llama"), out, mine, Settings(overwrite=True))
    assert mine.read_bytes() == text.read_bytes()


def test_a_held_out_text_that_is_trained_on_brings_a_warning(texts, tmp_path):
    """Also as a copy with another name."""
    one, two = texts
    copy = shutil.copy(one, tmp_path / "copy.txt")
    for held_out, expected in (([two], []), ([two, one], [one]), ([copy], [copy])):
        monitor = WarningRecorder()
        check_texts(tmp_path / "new", recipe(one, *held_out), monitor)
        assert [line.partition(": this text is trained on, too")[0] for line in monitor.warnings] == [
            f"--eval-data {path}" for path in expected
        ]


def test_the_card_says_which_step_was_kept_also_if_it_is_the_start():
    start = {"steps": 8, "kept_step": 0, "seed": 0, "lr": 0.0, "eval_text": []}
    card = recovery_section([start, start | {"kept_step": 4}])
    first, second = card.split("| option | value |")[1:]
    rows = ["| steps | `8` |", "| kept_step | `0` |", "| seed | `0` |", "| lr | `0.0` |"]
    assert [line for line in first.splitlines() if line.startswith("| ")] == ["| --- | --- |", *rows]
    assert "the weights are those from before this training" in first
    assert "| kept_step | `4` |" in second and "before this training" not in second


def test_a_folder_of_another_program_is_to_be_compressed_first(tiny, text, tmp_path):
    with pytest.raises(RiaError, match="`ria-vllm compress .* keeps its zeros: distil NEW"):
        run(tiny("llama"), tiny("llama"), tmp_path / "out", text)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_a_stranger_wrote_into_recipe_and_report_does_not_stop_a_run_at_its_end(pruned, text, tmp_path):
    dense, folder = pruned()
    copy, config = shutil.copytree(folder, tmp_path / "copy"), json.loads((folder / "config.json").read_text())
    quantization, before = config["quantization_config"], {"steps": 3}
    for number, (told, kept) in enumerate(((7, []), ([7, before], [before]))):
        recipe = quantization["recipe"] | {"source": 5, "distill": told}
        edit_config(copy, quantization_config=quantization | {"recipe": recipe})
        (copy / "ria_report.json").write_text(json.dumps({"distill": told}))
        report = run(dense, copy, tmp_path / f"out{number}", text, tokens=128)
        assert report["recipe"]["distill"][:-1] == report["distill"][:-1] == kept


def test_a_damaged_report_is_found_before_the_first_step(pruned, text, tmp_path, monkeypatch):
    dense, folder = pruned()
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "ria_report.json").write_text("{")
    monkeypatch.setattr(Training, "run", lambda _: pytest.fail("it has begun"))
    with pytest.raises(RiaError, match="ria_report.json: not readable as JSON.* Get the file again.$"):
        run(dense, copy, tmp_path / "out", text)

"""Which changes of a run's inputs are noticed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ria_vllm.checkpoint.inputs import ChangedInput, Inputs
from ria_vllm.errors import RiaError


@pytest.fixture
def folder(pruned_llama, tmp_path) -> Path:
    copy = Path(shutil.copytree(pruned_llama.folder, tmp_path / "folder"))
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tools.jinja").write_text("a")
    (copy / "1_Dense").mkdir()
    shutil.copy(copy / "permutations.safetensors", copy / "1_Dense" / "model.safetensors")
    (copy / "modules.json").write_text(json.dumps([{"path": "1_Dense", "type": "sentence_transformers.models.Dense"}]))
    (copy / "proofs").mkdir(exist_ok=True)
    shutil.copy(copy / "permutations.safetensors", copy / "proofs" / "products.safetensors")
    return copy


def rewrite(path: Path) -> None:
    """The same size, and a new time."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def another_for_a_while(path: Path) -> None:
    """A move and a move back leave size and time as they were."""
    path.rename(path.with_name(".before"))
    path.write_bytes(b"other")
    path.with_name(".before").rename(path)


def of_the_same_time(path: Path) -> None:
    before = path.stat()
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, truncate, os.utime, another_for_a_while, of_the_same_time])
def test_a_change_of_any_file_is_noticed_and_the_file_named(change, folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 9
    for path in files:
        inputs = Inputs(folder)
        inputs.check()
        content = path.read_bytes()
        change(path)
        with pytest.raises(ChangedInput, match=f"^{path}: has changed since this run began"):
            inputs.check()
        path.write_bytes(content)


def test_a_replaced_folder_is_noticed_and_a_file_that_was_not_there(folder, tmp_path):
    inputs, text = Inputs(folder), tmp_path / "text.txt"
    inputs.stamps(text)
    inputs.check()
    text.write_text("words")
    with pytest.raises(ChangedInput, match=f"^{text}: has changed"):
        inputs.check()
    text.unlink()
    (folder / "chat_template.jinja").unlink()
    inputs = Inputs(folder)
    (folder / "chat_template.jinja").write_text("new")
    with pytest.raises(ChangedInput, match="chat_template.jinja"):
        inputs.check()
    inputs = Inputs(folder)
    folder.rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", folder)
    with pytest.raises(ChangedInput, match=str(folder)):
        inputs.check()


def test_what_is_gone_may_come_back(folder, tmp_path):
    """A later run goes on with it. This one cannot know what was there meanwhile."""
    inputs = Inputs(folder)
    path, stamps = folder / "config.json", inputs.stamps(folder)
    path.rename(tmp_path / "gone")
    with pytest.raises(RiaError, match=f"^{path}: cannot be read any more") as found:
        inputs.check()
    assert isinstance(found.value.__cause__, OSError) and not isinstance(found.value, ChangedInput)
    (tmp_path / "gone").rename(path)
    with pytest.raises(ChangedInput, match=f"^{path}"):
        inputs.check()
    inputs = Inputs(folder)
    assert inputs.stamps(folder) == stamps
    inputs.check()
    folder.rename(tmp_path / "moved")
    with pytest.raises(RiaError, match="cannot be read any more"):
        inputs.check()


def test_what_no_run_reads_may_change(folder, tmp_path):
    """`eval --update-card` changes card and report, and a log or an output folder may lie in the model's folder."""
    for name in ("README.md", "ria_report.json"):
        (folder / name).write_text("{}")
    inputs = Inputs(folder)
    for name in ("README.md", "ria_report.json"):
        (folder / name).write_text("{ }")
    (folder / "run.log").write_text("words")
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("{}")
    inputs.check()


def test_a_file_that_the_hubs_cache_gets_again_is_the_same(tmp_path):
    cache = tmp_path / "models--user--model"
    snapshot, blobs = cache / "snapshots" / ("a" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("1" * 64, "2" * 64):
        (blobs / name).write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / ("1" * 64))
    inputs = Inputs(snapshot)
    (blobs / ("1" * 64)).unlink()
    (blobs / ("1" * 64)).write_text("{}")
    inputs.check()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(blobs / ("2" * 64))
    with pytest.raises(ChangedInput, match="config.json"):
        inputs.check()


def test_another_error_is_a_consequence_if_an_input_has_changed(folder, tmp_path):
    def run(change):
        inputs = Inputs(folder)
        with inputs.watched():
            change()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run(lambda: None)
    with pytest.raises(ChangedInput, match="config.json") as found:
        run(lambda: rewrite(folder / "config.json"))
    assert isinstance(found.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="broken"):  # which says more of a file that is not there
        run(lambda: (folder / "config.json").unlink())

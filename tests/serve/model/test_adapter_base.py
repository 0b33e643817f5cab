"""Which LoRA adapters are taken for the dense model's, by what PEFT has written into them."""

import json
import shutil
from contextlib import nullcontext

import pytest

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.serve.model.adapters import check_base

SOURCE = "Org/Dense-1B"
BOTH_WAYS = "RIA_VLLM_OWN_ADAPTERS=1 .* RIA_VLLM_OWN_ADAPTERS=0"


def with_base(folder, base):
    """An adapter's folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def check(base, where, folder, message=None, source=SOURCE):
    """Check an adapter that says `base`; `message`: of its refusal."""
    adapter = with_base(folder / "adapter", base)
    refused = pytest.raises(RiaError, match=f"adapter mine: {adapter}/adapter_config.json .*{message}.*{BOTH_WAYS}")
    with nullcontext() if message is None else refused:
        check_base(adapter, "mine", where, source)


@pytest.mark.parametrize("base", ["itself", "a link", "its name", "another", None])
def test_an_adapter_of_the_folder_itself_is_not_turned(base, tmp_path):
    """PEFT writes down how the model that was trained was called."""
    folder = tmp_path / "served"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    where = "org/served" if base == "its name" else str(folder)
    names = {"itself": str(folder), "a link": str(tmp_path / "link"), "its name": where, "another": "org/dense"}
    message = {"another": None, None: "does not say"}.get(base, "trained on .*, the folder that is served")
    check(names.get(base), where, tmp_path, message, source="org/dense")


@pytest.mark.parametrize(
    "base",
    [
        "org/dense-1b",
        "/home/who/models/Dense-1B/",
        r"C:\models\Dense-1B",
        "/cache/models--Org--Dense-1B/snapshots/0123abc"
    ],
)  # fmt: skip
def test_the_dense_model_by_its_name(base, tmp_path):
    check(base, "/srv/pruned", tmp_path)


def test_a_model_that_was_pruned_from_a_snapshot(tmp_path):
    """The last part of its path is a commit."""
    check("/cache/models--Org--Dense-1B/snapshots/0123abc", "/srv/pruned", tmp_path, source="0123abc")
    check("/cache/models--Org--Dense-1B/snapshots/4567def", "/srv/pruned", tmp_path, "may be", source="0123abc")


@pytest.mark.parametrize("base", ["/models/out", "models--Org--Dense-1B", ""])
def test_an_unknown_model(base, tmp_path):
    check(base, "/srv/pruned", tmp_path, r"\(Org/Dense-1B\)")


@pytest.mark.parametrize("source", [None, ["Org/Dense-1B"]])
def test_a_folder_that_does_not_name_its_dense_model(source, tmp_path):
    check("Org/Dense-1B", "/srv/pruned", tmp_path, "config.json does not name it", source=source)


@pytest.mark.parametrize("base", ["/home/who/pruned", "/cache/models--Who--Pruned/snapshots/01"])
@pytest.mark.parametrize("where", ["org/pruned", "/cache/models--org--pruned/snapshots/23"])
def test_the_served_folder_at_another_place(base, where, tmp_path):
    check(base, where, tmp_path, "the folder that is served has this name")


def test_the_served_folder_has_the_name_of_its_dense_model(tmp_path):
    check(SOURCE, "/srv/Dense-1B", tmp_path)
    check("/elsewhere/Dense-1B", "/srv/Dense-1B", tmp_path, "the folder that is served has this name")


def test_folders_that_can_be_read(checkpoint, tmp_path):
    """Their content counts, whatever their names. What may be a trainer's checkpoint of the pruned model needs the name
    of the dense one."""
    export_dense(Reader(checkpoint), tmp_path / "Dense-1B", 1 << 40)
    check(str(tmp_path / "Dense-1B"), str(checkpoint), tmp_path, "which `ria-vllm export` wrote")
    copy = shutil.copytree(checkpoint, tmp_path / "copy" / "Dense-1B")
    check(str(copy), str(checkpoint), tmp_path, "which is a pruned folder")
    for name, message in (("checkpoint-500", "may be the dense model or not"), ("dense-1b", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        check(str(tmp_path / name), str(checkpoint), tmp_path, message)

"""`push`, to a stand-in for the Hub on 127.0.0.1."""

import shutil
from pathlib import Path

import hub as stand_in
import pytest
from click.testing import CliRunner

from ria_vllm.checkpoint.weight_files import weight_files
from ria_vllm.errors import RiaError
from ria_vllm.hub.push import push

CARD = "---\nlicense: mit\n---\n\n# A model\n\n```sh\npip install .[cuda]\nvllm serve .\n```\n"
EXPECTED = {
    "config.json",
    "permutations.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "LICENSE",
}


@pytest.fixture
def folder(pruned_llama, tmp_path) -> Path:
    """A sound folder of several shards, with things in and around it that must not be uploaded."""
    out = tmp_path / "out"
    shutil.copytree(pruned_llama.folder, out)
    (out / "README.md").write_text(CARD)
    (out / "LICENSE").write_text("MIT")
    (tmp_path / "secret.txt").write_text("secret")
    for name in (".env", ".token.json", "ria_report.html", "notes.py", "optimizer.pt"):
        (out / name).write_text("private")
    (out / "deeper.partial").mkdir()
    (out / "deeper.partial" / "unit.safetensors").write_text("private")
    return out


@pytest.fixture
def hub(monkeypatch):
    with stand_in.running(stand_in.Hub()) as hub:
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in has no Xet server
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


def add_module(folder: Path) -> None:
    """A module of sentence-transformers with weights, and a chat template, in subfolders."""
    files = {
        "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "weights", "2_Dense/notes.py": "private",
        "additional_chat_templates/short.jinja": "{{ messages }}",
        "modules.json": '[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]',
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def run(*arguments):
    return CliRunner().invoke(push, [str(a) for a in arguments], catch_exceptions=False).stdout


def test_what_arrives_is_the_checkpoint_and_nothing_else(folder, hub):
    output = run(folder, "user/model")
    arrived = {name: content for name, content in hub.branches["main"].items() if name != ".gitattributes"}
    shards = {path.name for path in weight_files(folder).values()}
    assert len(shards) > 2 and EXPECTED | shards <= set(arrived)
    assert not {name for name in arrived if "private" in (folder / name).read_text(errors="replace")}
    card = arrived.pop("README.md").decode()
    assert card == CARD.replace("vllm serve .", "vllm serve user/model") and (folder / "README.md").read_text() == CARD
    assert all(content == (folder / name).read_bytes() for name, content in arrived.items())
    assert output.splitlines()[-1] == f"{hub.address}/user/model/tree/main"
    listed, _, left = output.partition("stays here: ")
    assert all(f"  {name} " in listed for name in [*arrived, "README.md"])
    assert left.splitlines()[0] == ".env, .token.json, deeper.partial, notes.py, optimizer.pt, ria_report.html"
    assert sum("/commit/" in request for request in hub.requests) == 1 and not hub.private


def test_private_and_on_a_branch(folder, hub):
    hub.branches["main"] = {}
    with pytest.raises(RiaError, match="user/model: exists already and is public"):
        run(folder, "user/model", "--private")
    assert hub.branches.pop("main") == {}
    output = run(folder, "user/model", "--private", "--revision", "a/b")
    assert hub.private and set(hub.branches["main"]) == {".gitattributes"}
    assert "config.json" in hub.branches["a/b"] and output.splitlines()[-1] == f"{hub.address}/user/model/tree/a/b"


def test_weights_of_an_older_model_do_not_stay_beside_the_new_ones(folder, hub):
    old = {"model.safetensors": b"old", "notes.md": b"kept", "onnx/model.safetensors": b"kept"}
    hub.branches["main"] = dict(old)
    assert "deleted there: model.safetensors" in run(folder, "user/model")
    there = set(hub.branches["main"])
    assert "model.safetensors" not in there and {"notes.md", "onnx/model.safetensors"} <= there


def test_a_file_that_the_hub_ignores_is_an_error(folder, hub):
    hub.ignored = {"tokenizer.json"}
    with pytest.raises(RiaError, match="did not take tokenizer.json"):
        run(folder, "user/model")


@pytest.mark.parametrize(
    ("where", "status"), [("/repos/create", 401), ("/preupload/", 403), ("^/store/", 500), ("/commit/", 409)]
)
def test_refusals_are_one_line_and_commit_nothing(folder, hub, where, status):
    hub.fails = {where: status}
    with pytest.raises(RiaError, match=f"^user/model: the upload failed .*{status}") as caught:
        run(folder, "user/model")
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and stand_in.TOKEN not in message
    assert set(hub.branches.get("main", {})) <= {".gitattributes"}


def test_a_folder_with_problems_stays(damage, hub):
    damage.replace("model.layers.0.mlp.gate_proj.compressed", lambda t: t.fill_(float("nan")))
    with pytest.raises(RiaError, match="nothing was uploaded.*gate_proj"):
        run(damage.folder, "user/model")
    damage.file_of("model.layers.0.mlp.gate_proj.compressed").unlink()
    with pytest.raises(RiaError, match="shard missing"):
        run(damage.folder, "user/model")
    assert hub.requests == []


def test_only_finished_compressed_folders(folder, tiny_llama, hub, tmp_path):
    with pytest.raises(RiaError, match="not a folder that `ria-vllm compress` wrote"):
        run(tiny_llama, "user/model")
    folder.rename(tmp_path / "out.partial")
    with pytest.raises(RiaError, match="Finish it first"):
        run(tmp_path / "out.partial", "user/model")
    assert hub.requests == []


def test_a_link_out_of_the_folder_is_not_followed(folder, hub, tmp_path):
    (folder / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RiaError, match="vocab.txt: a link that leads out of the folder"):
        run(folder, "user/model")
    assert hub.requests == []
    (folder / "vocab.txt").unlink()
    (folder / "notes.txt").symlink_to("LICENSE")  # a link within the folder is fine
    run(folder, "user/model")
    assert hub.branches["main"]["notes.txt"] == b"MIT"


def test_subfolders_that_belong_to_the_model(folder, hub, tmp_path):
    add_module(folder)
    run(folder, "user/model")
    arrived = {name for name in hub.branches["main"] if "/" in name}
    modules = {"2_Dense/config.json", "2_Dense/model.safetensors", "additional_chat_templates/short.jinja"}
    assert arrived == modules | {"proofs/products.safetensors"}
    (folder / "2_Dense" / "more.json").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RiaError, match="2_Dense/more.json: a link that leads out"):
        run(folder, "user/model")

"""Opening a model: what is accepted, and the errors for the rest."""

import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressing import edit_config, edit_weights, edited, run_small
from huggingface_hub.utils import filter_repo_objects

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.model import source
from ria_vllm.offline.run import compress
from ria_vllm.offline.run.compress import Settings
from ria_vllm.progress import Monitor


def put(tensors: dict, name: str, value: float) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[5] = value


DAMAGE = {
    "no safetensors here. GGUF files are not read": lambda m: (m / "model.safetensors").rename(m / "model.gguf"),
    "config.json: no such file": lambda m: (m / "config.json").unlink(),
    "LlamaForNothing, which is no class": lambda m: edit_config(m, architectures=["LlamaForNothing"]),
    "a t5 model is an encoder and a decoder": lambda m: edit_config(m, model_type="t5"),
    "does not know this model": lambda m: edit_config(m, model_type="nothing"),
    "quantized .gptq.": lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}),
    "already compressed": lambda m: edit_config(m, quantization_config={"quant_method": "ria"}),
    "text_config is not what the configuration of a llama model is": lambda m: edit_config(m, text_config=5),
    "its own Python code": lambda m: edit_config(m, model_type="new", auto_map={"AutoConfig": "x.Y"}),
    "broken or truncated": lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-9]),
    "no weights for model.layers.1.mlp.up_proj.weight": lambda m: edit_weights(
        m, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")
    ),
    "model.layers.1.self_attn.q_proj.weight: NaN": lambda m: edit_weights(
        m, lambda t: put(t, "model.layers.1.self_attn.q_proj.weight", float("nan"))
    ),
    "model: model.layers.1.mlp.down_proj: NaN or infinite values in its input.*in float32": lambda m: edit_weights(
        m, lambda t: put(t, "model.layers.1.mlp.up_proj.weight", 3e38)
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_bad_models_are_named_and_leave_nothing_unfinished_behind(message, model, text, tmp_path):
    DAMAGE[message](model)
    with pytest.raises(RiaError, match=message):
        run_small(model, tmp_path / "out", text)
    finished = list(tmp_path.glob("out.partial/units/layer-*"))  # these are kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"] + ["out.partial"] * bool(finished)


@pytest.mark.parametrize(
    ("family", "name", "part"),
    [("llama", "self_attn.q_proj", "self_attn.q_proj"), ("qwen3-moe", "mlp.experts.3.down_proj", "mlp.experts.3")],
)
def test_weights_that_are_copied_without_being_run_are_checked(family, name, part, tiny, text, tmp_path):
    written = f"model.layers.1.{name}.weight"
    model = edited(tiny(family), tmp_path / "in", lambda tensors: put(tensors, written, float("nan")))
    with pytest.raises(RiaError, match=f"layers.1.*{part}.*: NaN or infinite values in the weights"):
        run_small(model, tmp_path / "out", text, ignore=(r"layers\.1\.",))


COMMANDS = {"compress": ["-o", "out", "--data", "text.txt"], "eval": ["--eval-data", "text.txt"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_a_tokenizer_does_not_run_even_if_someone_says_yes(command, model, text, tmp_path):
    """transformers would ask on standard input."""
    path, mark = model / "tokenizer_config.json", tmp_path / "ran"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (model / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    shutil.copy(text, tmp_path / "text.txt")
    arguments = [sys.executable, "-m", "ria_vllm", command, str(model), *COMMANDS[command]]
    done = subprocess.run(arguments, input="y\n" * 9, capture_output=True, text=True, cwd=tmp_path)
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "it needs its own Python code, which is not run here" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "no weights for lm_head.weight in any file"),
        (lambda t: put(t, "lm_head.weight", float("inf")), "lm_head.weight: NaN or infinite"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64)}), "model.norm.weight has shape .64,., config"),
    ],
)
def test_tensors_outside_the_layers_are_checked_before_any_work(change, message, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(compress._Run, "compress", lambda *_: pytest.fail("work had begun"))
    edit_weights(model, change)
    with pytest.raises(RiaError, match=message):
        run_small(model, tmp_path / "out", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("kind", ["model/../model", "around", "link"])
def test_the_model_itself_is_never_overwritten(kind, model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in sorted(model.iterdir())}
    out = Path(kind)
    if kind == "around":
        out = tmp_path
    elif kind == "link":
        out.symlink_to(model)
    with pytest.raises(RiaError, match="being read|with a name of its own"):
        run_small(model, out, text, Settings(overwrite=True))
    assert {path: path.read_bytes() for path in sorted(model.iterdir())} == before


def test_a_hub_id_is_fetched_without_pickles_and_code(monkeypatch, tiny, text, tmp_path):
    asked, ignored = {}, []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked[name] = allow_patterns
        ignored.extend(ignore_patterns)
        return str(tiny("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    run_small("some/model", Path("some/model"), text)  # a folder of the same name is no conflict
    assert list(asked) == ["some/model"] and not any(p.endswith((".bin", ".py")) for p in asked["some/model"])
    wanted = ("README.md", "LICENSE", "LICENSE.md", "Licence.txt", "NOTICE", "USE_POLICY.md")
    assert all(any(fnmatch.fnmatchcase(name, p) for p in asked["some/model"]) for name in wanted)
    weights = ["model-00001-of-00002.safetensors", "2_Dense/model.safetensors"]
    copies = ["original/model.safetensors", "original/dtypes.json", "consolidated-00001-of-00002.safetensors"]
    found = filter_repo_objects([*weights, *copies], allow_patterns=asked["some/model"], ignore_patterns=ignored)
    assert list(found) == weights
    assert Reader(tmp_path / "some" / "model").schema.recipe["source"] == "some/model"
    assert "\nbase_model: some/model\n" in (tmp_path / "some" / "model" / "README.md").read_text()


def test_links_out_of_the_folder_are_not_followed(model, tmp_path):
    """A cloned repository may contain any; a snapshot in the hub's cache consists of links to its blobs."""
    (tmp_path / "secret").write_text("secret")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    shutil.copytree(model, snapshot)
    (blobs / "4567").write_text("{}")
    (tmp_path / "here").symlink_to(snapshot)
    (snapshot / "vocab.json").symlink_to("../../blobs/4567")
    (snapshot / "merges.txt").symlink_to("tokenizer.json")
    for folder in (snapshot, tmp_path / "here"):
        found = set(source.opened(str(folder), Monitor(shown=False)).small_files())
        assert {"vocab.json", "merges.txt", "tokenizer.json"} <= found
    for name, target in (("LICENSE", str(tmp_path / "secret")), ("other.json", "../../blobs/../../secret")):
        (snapshot / name).symlink_to(target)
        with pytest.raises(RiaError, match=f"{name}: a link that leads out of the folder"):
            source.opened(str(snapshot), Monitor(shown=False))
        (snapshot / name).unlink()


def test_shards_and_names_without_the_base_models_prefix(make_model, text, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = make_model(tmp_path / "whole", "opt")
    run_small(whole, tmp_path / "one", text)
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / file, tmp_path / "base" / file)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    run_small(tmp_path / "base", tmp_path / "two", text)
    one, two = Reader(tmp_path / "one"), Reader(tmp_path / "two")
    assert set(one.sparse_names) == set(two.sparse_names)
    assert all(torch.equal(one.linear(name).dense(), two.linear(name).dense()) for name in one.sparse_names)

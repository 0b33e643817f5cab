"""Opening a model: what is accepted, and what is said of the rest."""

import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline import compress as pipeline
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.model import source
from ria_vllm.offline.pruning.masks import Pattern
from ria_vllm.offline.publish import published
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor


def run(model: Path | str, out: Path, text: Path, settings: Settings = Settings(), **options) -> None:
    recipe = Recipe(**{"calibration": str(text), "samples": 4, "seq_len": 32, "reconstruct": "none"} | options)
    compress(str(model), out, recipe, settings, Monitor(shown=False))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A private copy of a tiny Llama."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def put(tensors: dict, name: str, value: float) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[5] = value


DAMAGE = {
    "no weights here": lambda m: (m / "model.safetensors").unlink(),
    "model.save_pretrained": lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
    "give the file itself": lambda m: (m / "model.safetensors").rename(m / "model.gguf"),
    "config.json: no such file": lambda m: (m / "config.json").unlink(),
    "LlamaForSequenceClassification, which is not": lambda m: edit_config(m, architectures=["LlamaForSequenceClassification"]),
    "a t5 model is not a causal": lambda m: edit_config(m, model_type="t5"),
    "does not know this model": lambda m: edit_config(m, model_type="nothing"),
    "quantized .gptq.": lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}),
    "already compressed": lambda m: edit_config(m, quantization_config={"quant_method": "ria"}),
    "its own Python code": lambda m: edit_config(m, model_type="new", auto_map={"AutoConfig": "x.Y"}),
    "broken or truncated": lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-9]),
    "asks for": lambda m: edit_config(m, intermediate_size=256),
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
        run(model, tmp_path / "out", text)
    finished = list(tmp_path.glob("out.partial/units/layer-*"))  # kept, whatever comes later
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"] + ["out.partial"] * bool(finished)


COMMANDS = {"compress": ["-o", "out", "--calibration", "text.txt"], "eval": ["--text", "text.txt"]}


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


def test_a_model_that_reads_more_than_text(tiny, text, tmp_path):
    from transformers import Gemma3Config

    model = Path(shutil.copytree(tiny("gemma3"), tmp_path / "model"))
    words = json.loads((model / "config.json").read_text())
    Gemma3Config(text_config=words, architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(model)
    with pytest.raises(RiaError, match="a gemma3 model reads more than text, and only text models are compressed"):
        run(model, tmp_path / "out", text)


def test_gpt2_has_nothing_to_prune(make_model, text, tmp_path):
    make_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(RiaError, match="Conv1D"):
        run(tmp_path / "gpt2", tmp_path / "out", text)


def test_too_little_text_leaves_nothing_behind(model, text, tmp_path):
    with pytest.raises(RiaError, match="too little text"):
        run(model, tmp_path / "out", text, samples=10**6)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "no weights for lm_head.weight in any file"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1]}), "lm_head.weight has shape .257, 128., config"),
        (lambda t: put(t, "lm_head.weight", float("inf")), "lm_head.weight: NaN or infinite"),
        (lambda t: t.pop("model.norm.weight"), "no weights for model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64)}), "model.norm.weight has shape .64,., config"),
    ],
)
def test_what_lies_outside_the_layers_is_checked_before_any_work(change, message, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_run", lambda *_: pytest.fail("work had begun"))
    edit_weights(model, change)
    with pytest.raises(RiaError, match=message):
        run(model, tmp_path / "out", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_existing_output_stays_untouched(model, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RiaError, match="exists already"):
        run(model, tmp_path / "out", text)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize("kind", ["model", "model/../model", ".", "around", "link"])
def test_the_model_itself_is_never_overwritten(kind, model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in sorted(model.iterdir())}
    out = Path(kind)
    if kind == "around":
        out = tmp_path
    elif kind == "link":
        out.symlink_to(model)
    with pytest.raises(RiaError, match="being read|with a name of its own"):
        run(model, out, text, Settings(overwrite=True))
    assert {path: path.read_bytes() for path in sorted(model.iterdir())} == before


@pytest.mark.parametrize("out", [".", "..", "/", ""])
def test_places_that_are_no_new_folder(out, tiny, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RiaError, match="cannot be replaced by a new folder"):
        run(tiny("llama"), Path(out), text, Settings(overwrite=True))
    assert list(tmp_path.iterdir()) == []


def test_neither_here_nor_on_the_hub(monkeypatch, text, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no network\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(RiaError, match=r"nobody/nothing: no such folder .*\(no network\)"):
        run("nobody/nothing", tmp_path / "out", text)


def test_a_hub_id_is_fetched_without_pickles_and_code(monkeypatch, tiny, text, tmp_path):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tiny("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    run("some/model", Path("some/model"), text)  # a folder of the same name is no conflict
    assert list(asked) == ["some/model"] and not any(p.endswith((".bin", ".py")) for p in asked["some/model"])
    wanted = ("README.md", "LICENSE", "LICENSE.md", "Licence.txt", "NOTICE", "USE_POLICY.md")
    assert all(any(fnmatch.fnmatchcase(name, p) for p in asked["some/model"]) for name in wanted)
    assert Reader(tmp_path / "some" / "model").schema.recipe["source"] == "some/model"
    assert "\nbase_model: some/model\n" in (tmp_path / "some" / "model" / "README.md").read_text()


def test_small_files_come_along_but_no_code_and_no_other_weights(model, text, tmp_path):
    for name in ("chat_template.jinja", "generation_config.json", "modeling_x.py", "pytorch_model.bin", "x.gguf"):
        (model / name).write_text("{}")
    run(model, tmp_path / "out", text)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= found
    assert not found & {"modeling_x.py", "pytorch_model.bin", "x.gguf"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert {key: config[key] for key in original} == original
    assert config["quantization_config"]["recipe"]["samples"] == 4


def test_links_out_of_the_folder_are_not_followed(model, tmp_path):
    """A cloned repository may have any; a snapshot in the hub's cache consists of links, to its blobs."""
    (tmp_path / "secret").write_text("secret")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    shutil.copytree(model, snapshot)
    (blobs / "4567").write_text("{}")
    (tmp_path / "here").symlink_to(snapshot)
    for name, target in (
        ("notes.txt", "../../../secret"), ("vocab.json", "../../blobs/4567"), ("merges.txt", "tokenizer.json"),
        ("LICENSE", str(tmp_path / "secret")), ("other.json", "../../blobs/../../secret"),
    ):  # fmt: skip
        (snapshot / name).symlink_to(target)
    for folder in (snapshot, tmp_path / "here"):
        said = []
        with source.opened(str(folder), tmp_path / "work", Ranks(), SimpleNamespace(warn=said.append)) as opened:
            found = {path.name for path in opened.small_files()}
        assert {"vocab.json", "merges.txt", "tokenizer.json"} <= found
        assert not found & {"notes.txt", "LICENSE", "other.json"}
        assert sorted(text.split(": ")[0].rpartition("/")[2] for text in said) == ["LICENSE", "notes.txt", "other.json"]
    # Older versions of the hub's command line: a local folder of links to its cache.
    local = shutil.copytree(model, tmp_path / "local")
    (local / "vocab.json").symlink_to(blobs / "4567")
    with source.opened(str(local), tmp_path / "work", Ranks(), SimpleNamespace(warn=pytest.fail)) as opened:
        assert "vocab.json" in {path.name for path in opened.small_files()}
    (local / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(RiaError, match="tokenizer.model: a link that leads out of the folder"):
        with source.opened(str(local), tmp_path / "work", Ranks(), SimpleNamespace(warn=pytest.fail)):
            pass


def test_nothing_of_where_files_lay_is_published(model, text, tmp_path, monkeypatch):
    """Wherever the names come from: the command line, or what transformers wrote into the source."""
    secret = tmp_path / "secret" / "place"
    shutil.copytree(model, secret / "my-model")
    shutil.copy(text, secret / "words.txt")
    edit_config(secret / "my-model", _name_or_path=str(secret / "older"), nested={"_name_or_path": "meta/llama"})
    tokenizer = secret / "my-model" / "tokenizer_config.json"
    content = json.loads(tokenizer.read_text()) | {"name_or_path": "~/secret/older", "tokenizer_file": str(secret / "t.json")}
    tokenizer.write_text(json.dumps(content))
    monkeypatch.chdir(secret / "my-model")
    for number, name in enumerate((str(secret / "my-model"), ".", "../my-model/")):
        out = tmp_path / f"out{number}"
        run(name, out, secret / "words.txt")
        recipe = Reader(out).schema.recipe
        assert recipe["source"] == "my-model" and recipe["calibration"] == "words.txt"
        assert json.loads((out / "ria_report.json").read_text())["recipe"] == recipe
        config = json.loads((out / "config.json").read_text())
        assert config["_name_or_path"] == "older" and config["nested"] == {"_name_or_path": "meta/llama"}
        assert json.loads((out / "tokenizer_config.json").read_text()) == content | {
            "name_or_path": "older", "tokenizer_file": "t.json"
        }  # fmt: skip
        assert not [path for path in out.iterdir() if b"secret" in path.read_bytes()]


def test_the_license_comes_along_and_the_card_is_a_new_one(model, text, tmp_path):
    legal = ("LICENSE", "LICENSE-2.0", "Licence.md", "NOTICE", "USE_POLICY.md", "license.txt")
    for name in (*legal, "LICENSE.py", "LICENSE.safetensors", "licensed_weights.bin", "notes.md"):
        (model / name).write_text(name)
    (model / "README.md").write_text("---\nlicense: mit\ntags: [chat]\n---\n# The base model's own words\n")
    run(model, tmp_path / "out", text)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {*legal, "README.md"} <= found
    assert not found & {"LICENSE.py", "LICENSE.safetensors", "licensed_weights.bin", "notes.md"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: mit\n" in card and "\n- chat\n" in card and "own words" not in card and str(tmp_path) not in card
    report = json.loads((tmp_path / "out" / "ria_report.json").read_text())["linears"]
    scores = [entry["retained_after"] for entry in report.values()]
    assert f"| retained score, mean | {sum(scores) / len(scores):.4f} |" in card
    assert f"| retained score, worst | {min(scores):.4f}, `" in card
    config = Reader(tmp_path / "out").schema.sparsity_config
    assert f"; {config.global_sparsity:.1%} of the weights" in card
    # A card that cannot be read costs the license in the new one, and nothing else.
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    run(model, tmp_path / "again", text)
    assert list(Reader(tmp_path / "again").problems()) == []
    assert "license" not in (tmp_path / "again" / "README.md").read_text().split("---\n")[1]


def test_plain_dense_folders_have_a_card_too(model, text, tmp_path):
    from transformers import AutoModelForCausalLM

    run(model, tmp_path / "out", text, pattern=Pattern(n=1, m=4), permute="none")
    card = (tmp_path / "out" / "README.md").read_text()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers
    weights = [m.weight for m in found.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert f"1:4; {zeros:.1%} of the weights" in card and "No kernel serves the pattern 1:4" in card
    assert "vllm serve" not in card


def test_shards_and_names_without_the_base_models_prefix(make_model, text, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = make_model(tmp_path / "whole", "opt")
    run(whole, tmp_path / "one", text)
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / file, tmp_path / "base" / file)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    run(tmp_path / "base", tmp_path / "two", text)
    one, two = Reader(tmp_path / "one"), Reader(tmp_path / "two")
    assert set(one.sparse_names) == set(two.sparse_names)
    assert all(torch.equal(one.linear(name).dense(), two.linear(name).dense()) for name in one.sparse_names)


def test_a_gguf_file_becomes_a_folder_first(make_model, monkeypatch, text, tmp_path):
    """The conversion itself is transformers' work, and is tried on a real file elsewhere."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    made = []

    def convert(path, folder):
        made.append(folder)
        make_model(folder, "llama", torch.bfloat16)

    monkeypatch.setattr(source, "convert_gguf", convert)
    run(tmp_path / "m.gguf", tmp_path / "out", text)
    assert list(Reader(tmp_path / "out").problems()) == []
    assert Reader(tmp_path / "out").schema.recipe["source"] == "m.gguf"
    assert not made[0].exists()


def test_a_broken_gguf_file(text, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(RiaError, match="cannot read this GGUF file"):
        run(tmp_path / "m.gguf", tmp_path / "out", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_a_name_that_can_be_no_path_is_no_error(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    for name in ("x" * 300, "a\0b", "org/" + "y" * 5000):
        assert published(name) == name
    assert published(str(closed / "model")) == "model"
    monkeypatch.chdir(tmp_path)
    assert published("closed/model") == "closed/model"

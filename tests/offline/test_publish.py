"""What goes into the new folder beside the weights: small files, licence and model card, and no local paths."""

import json
import shutil

from compressing import edit_config, run_small

from ria_vllm.checkpoint.reader import Reader


def test_small_files_come_along_but_no_code_and_no_other_weights(model, text, tmp_path):
    for name in ("chat_template.jinja", "generation_config.json", "modeling_x.py", "pytorch_model.bin", "x.gguf"):
        (model / name).write_text("{}")
    run_small(model, tmp_path / "out", text)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= found
    assert not found & {"modeling_x.py", "pytorch_model.bin", "x.gguf"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert {key: config[key] for key in original} == original
    assert config["quantization_config"]["recipe"]["samples"] == 4


def test_no_local_path_is_published(model, text, tmp_path, monkeypatch):
    """Neither from the command line nor from what transformers wrote into the source."""
    secret = tmp_path / "secret" / "place"
    shutil.copytree(model, secret / "my-model")
    shutil.copy(text, secret / "words.txt")
    edit_config(secret / "my-model", _name_or_path=str(secret / "older"), nested={"_name_or_path": "meta/llama"})
    tokenizer = secret / "my-model" / "tokenizer_config.json"
    content = json.loads(tokenizer.read_text()) | {
        "name_or_path": "~/secret/older",
        "tokenizer_file": str(secret / "t.json"),
    }
    tokenizer.write_text(json.dumps(content))
    monkeypatch.chdir(secret / "my-model")
    for number, name in enumerate((str(secret / "my-model"), ".", "../my-model/")):
        out = tmp_path / f"out{number}"
        run_small(name, out, secret / "words.txt")
        recipe = Reader(out).schema.recipe
        assert recipe["source"] == "my-model" and recipe["calibration"] == "words.txt"
        assert json.loads((out / "ria_report.json").read_text())["recipe"] == recipe
        config = json.loads((out / "config.json").read_text())
        assert config["_name_or_path"] == "older" and config["nested"] == {"_name_or_path": "meta/llama"}
        assert json.loads((out / "tokenizer_config.json").read_text()) == content | {
            "name_or_path": "older", "tokenizer_file": "t.json"
        }  # fmt: skip
        assert not [path for path in out.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_the_license_comes_along_and_the_card_is_a_new_one(model, text, tmp_path):
    legal = ("LICENSE", "LICENSE-2.0", "Licence.md", "NOTICE", "USE_POLICY.md", "license.txt")
    for name in (*legal, "LICENSE.py", "LICENSE.safetensors", "licensed_weights.bin", "notes.md"):
        (model / name).write_text(name)
    (model / "README.md").write_text("---\nlicense: mit\ntags: [chat]\n---\n# The base model's own words\n")
    run_small(model, tmp_path / "out", text)
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
    # If the card cannot be read, the new one lacks the license, and nothing else changes.
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    run_small(model, tmp_path / "again", text)
    assert list(Reader(tmp_path / "again").problems()) == []
    assert "license" not in (tmp_path / "again" / "README.md").read_text().split("---\n")[1]

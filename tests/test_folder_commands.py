"""`inspect`, `verify` and `export`, called as a user calls them."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.folder_commands import export, inspect, verify

Q, DOWN, GATE = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"


def run(command, *arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)


def test_inspect_counts_the_bytes_that_are_there(pruned_llama):
    found = json.loads(run(inspect, pruned_llama.folder, "--json").output)
    tensors = {}
    for path in pruned_llama.folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for entry in found["linears"]:
        own = [t for n, t in tensors.items() if n.rpartition(".")[0] == entry["name"]]
        assert len(own) in (3, 4) and entry["bytes"] == sum(t.numel() * t.element_size() for t in own)
        dense = pruned_llama.dense[entry["name"] + ".weight"]
        assert entry["shape"] == list(dense.shape) and entry["dtype"] == "bfloat16"
        assert entry["dense_bytes"] == dense.numel() * 2
        assert entry["sparsity"] == pytest.approx(float((dense == 0).double().mean()))
    totals = found["totals"]
    assert totals["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert totals["dense_bytes"] == sum(t.numel() * 2 for t in pruned_llama.dense.values())
    assert totals["ratio"] == pytest.approx(totals["bytes"] / totals["dense_bytes"])
    weights = sum(pruned_llama.dense[entry["name"] + ".weight"].numel() for entry in found["linears"])
    bits = 8 * totals["linear_bytes"] / weights
    values = {"scheme": "BF16", "pattern": "2:4"}
    values |= {"format": "bfloat16", "group_size": None, "bits_per_weight": pytest.approx(bits), "inputs": None}
    assert found["values"] == values and 9 < bits < 9.5
    shown = run(inspect, pruned_llama.folder).output
    assert f"their values:   BF16, 2:4: bfloat16, {bits:.2f} bits per weight\n" in shown
    assert all(name in shown for name in (Q, DOWN, GATE, "4 folded, 6 gathered, 4 none", "lm_head", "magnitude"))
    assert totals["linears"] == 14 and totals["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_a_fold_with_a_missing_producer_becomes_a_gather(damage):
    fold = {"producers": [{"name": "model.layers.{i}.mlp.fc1"}]}
    damage.edit_json("config.json", lambda c: c["quantization_config"]["folds"][1].update(fold))
    kinds = {e["name"]: e["permutation"] for e in json.loads(run(inspect, damage.folder, "--json").output)["linears"]}
    assert kinds[DOWN] == "gathered"


def test_no_escape_sequence_of_a_config_reaches_the_terminal(damage):
    def change(config):
        config["quantization_config"]["recipe"]["source"] = "\x1b]0;x\x07\ud800\nall weights: 1 B"
        config["quantization_config"]["sparsity_config"]["ignore"].append("\x1b[2J")

    damage.edit_json("config.json", change)
    found = run(inspect, damage.folder)
    assert (
        found.exit_code == 0 and "\x1b" not in found.output and r"\x1b]0;x\x07\ud800\nall weights: 1 B" in found.output
    )
    damage.edit_json("config.json", lambda c: c["quantization_config"]["folds"][0].update({"\x1b[2J": 1}))
    found = run(verify, damage.folder)
    assert found.exit_code == 1 and r"\x1b[2J" in found.output and "\x1b" not in found.output


def test_verify_names_every_damaged_layer(damage):
    def break_group(bitmask):
        bitmask[0, 0] = 255
        return bitmask

    damage.replace(f"{Q}.bitmask", break_group)
    damage.replace(f"{DOWN}.compressed", lambda values: values * float("inf"))
    found = run(verify, damage.folder)
    assert found.exit_code == 1 and Q in found.output and DOWN in found.output and "2 problems" in found.output


@pytest.mark.parametrize("harm", ["shard", "config", "index"])
def test_verify_broken_folders(damage, harm):
    shard = damage.file_of(f"{Q}.compressed")
    if harm == "shard":
        shard.unlink()
    elif harm == "config":
        (damage.folder / "config.json").write_text("not json")
    else:
        damage.edit_json("model.safetensors.index.json", lambda c: c["weight_map"].update({f"{Q}.shape": "../x"}))
    found = run(verify, damage.folder)
    named = {"shard": shard.name, "config": "config.json", "index": "'../x'"}[harm]
    assert found.exit_code == 1 and named in found.output


def test_export_is_the_dense_model_in_its_own_order(pruned_llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "dense"
    assert run(export, pruned_llama.folder, "-o", out).exit_code == 0
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (out / "permutations.safetensors").exists() and list(tmp_path.iterdir()) == [out]
    found = load_file(out / "model.safetensors")
    assert set(found) == set(pruned_llama.dense)
    assert all(torch.equal(found[name], tensor) for name, tensor in pruned_llama.dense.items())

    exported = AutoModelForCausalLM.from_pretrained(out)
    source = AutoModelForCausalLM.from_pretrained(pruned_llama.source)
    source.load_state_dict(pruned_llama.dense, strict=True)
    tokens = torch.arange(2, 50)[None]
    assert torch.equal(exported(tokens).logits, source(tokens).logits)
    assert AutoTokenizer.from_pretrained(out).encode("pruned") == AutoTokenizer.from_pretrained(
        pruned_llama.source
    ).encode("pruned")


def test_export_does_not_follow_a_link_out_of_the_folder(damage, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (damage.folder / "vocab.txt").symlink_to("tokenizer.json")
    export_dense(Reader(damage.folder), tmp_path / "dense", 10**9)
    assert (tmp_path / "dense" / "vocab.txt").is_file()
    (damage.folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(RiaError, match="notes.txt: a link that leads out of the folder"):
        export_dense(Reader(damage.folder), tmp_path / "other", 10**9)
    assert not (tmp_path / "other").exists()


def test_export_of_a_damaged_folder_leaves_nothing(damage, tmp_path):
    damage.replace(f"{Q}.bitmask", lambda t: t * 0)
    with pytest.raises(RiaError, match=Q):
        run(export, damage.folder, "-o", tmp_path / "dense")
    assert not list(tmp_path.glob("dense*"))


def test_export_never_touches_what_exists(damage, tmp_path):
    (tmp_path / "dense").mkdir()
    with pytest.raises(RiaError, match="exists already"):
        run(export, damage.folder, "-o", tmp_path / "dense")
    for same in (damage.folder, damage.folder / ".." / damage.folder.name):
        with pytest.raises(RiaError, match="the folder being read"):
            run(export, damage.folder, "-o", same, "--overwrite")
    with pytest.raises(RiaError, match="holds what is being read"):
        run(export, damage.folder, "-o", tmp_path, "--overwrite")
    assert (damage.folder / "config.json").exists()

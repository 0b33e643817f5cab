"""The reader: what it returns equals what was stored, and every way of damaging a folder is found by layer or file."""

import json
import shutil

import pytest
import torch
from damage import bind, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint import Reader, is_compressed
from ria_vllm.errors import RiaError
from ria_vllm.weight_files import weight_files

Q, OUT = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
INDEX = "model.safetensors.index.json"


def problems(folder) -> list[str]:
    try:
        return list(Reader(folder).problems())
    except RiaError as error:
        return [str(error)]


def test_every_linear_comes_back_in_the_models_own_order(pruned_llama):
    reader = Reader(pruned_llama.folder)
    assert len(reader.sparse_names) == 14 and set(reader.permuted_names) == set(pruned_llama.permutations)
    for name in reader.sparse_names:
        assert torch.equal(reader.linear(name).dense(), pruned_llama.dense[f"{name}.weight"])
    for name in reader.dense_names:
        assert torch.equal(reader.tensor(name), pruned_llama.dense[name])
    own = {f"{name}.weight" for name in reader.sparse_names} | set(reader.dense_names)
    assert own == set(pruned_llama.dense)


def test_a_sound_folder_has_no_problems(pruned_llama):
    assert problems(pruned_llama.folder) == []
    assert is_compressed(pruned_llama.folder) and not is_compressed(pruned_llama.source)


def flip_one_bit(bitmask):
    bitmask[3, 2] ^= 16
    return bitmask


def move_one_bit(bitmask):
    """Four of the byte's eight bits are still set, but three in one group of four and one in the other."""
    bitmask[3, 2] = 0b00010111
    return bitmask


def not_a_number(values):
    values[1, 1] = float("nan")
    return values


def repeat_an_index(p):
    p[5] = p[6]
    return p


def swap_across_heads(p):
    p[[0, 100]] = p[[100, 0]]
    return p


def differ_within_a_group(p):
    """Swapped in the first query head only, while the second reads the same key-value head."""
    p[[0, 1]] = p[[1, 0]]
    return p


@pytest.mark.parametrize(
    "tensor, change, layer, words",
    [
        (f"{Q}.bitmask", flip_one_bit, Q, "exactly two"),
        (f"{Q}.bitmask", move_one_bit, Q, "exactly two"),
        (f"{Q}.bitmask", lambda t: t[:-1], Q, "expected 128 x 128"),
        (f"{Q}.bitmask", lambda t: t[:, :-1], Q, "expected 128 x 128"),
        (f"{Q}.bitmask", lambda t: t.to(torch.int8), Q, "int8"),
        (f"{Q}.bitmask", lambda t: t.flatten(), Q, "expected a matrix"),
        (f"{Q}.bitmask", lambda t: None, Q, "missing"),
        (f"{Q}.compressed", lambda t: t[:, :-1], Q, "compressed has shape"),
        (f"{Q}.compressed", lambda t: t.double(), Q, "float64"),
        (f"{Q}.compressed", not_a_number, Q, "NaN"),
        (f"{Q}.compressed", lambda t: None, Q, "missing"),
        (f"{Q}.shape", lambda t: t + 64, Q, "expected 192 x 192"),
        (f"{Q}.shape", lambda t: t.float(), Q, "int64"),
        (f"{Q}.shape", lambda t: t[:1], Q, "two int64"),
        (f"{Q}.shape", lambda t: None, Q, "missing"),
        (f"{Q}.input_permutation", repeat_an_index, Q, "not a permutation"),
        (f"{Q}.input_permutation", lambda t: t + 1, Q, "outside 0..127"),
        (f"{Q}.input_permutation", lambda t: t - 2**30, Q, "outside 0..127"),
        (f"{Q}.input_permutation", lambda t: t.sort().values[:64], Q, "expected (128,)"),
        (f"{Q}.input_permutation", lambda t: t.view(2, 64), Q, "shape"),
        (f"{Q}.input_permutation", lambda t: t.half(), Q, "dtype"),
        (f"{OUT}.input_permutation", swap_across_heads, OUT, "another head"),
        (f"{OUT}.input_permutation", differ_within_a_group, OUT, "different orders"),
        ("model.norm.weight", lambda t: t * float("inf"), "model.norm.weight", "infinite"),
    ],
)
def test_damaged_tensors_are_found_by_layer(damage, tensor, change, layer, words):
    damage.replace(tensor, change)
    bind(damage.folder)
    found = problems(damage.folder)
    assert len(found) == 1 and layer in found[0] and words in found[0], found


def test_any_bit_of_any_bitmask(damage):
    """Four random flips over all linears: each one found, each one's layer named."""
    reader = Reader(damage.folder)
    generator = torch.Generator().manual_seed(11)
    chosen = [reader.sparse_names[i] for i in torch.randperm(len(reader.sparse_names), generator=generator)[:4]]
    for name in chosen:

        def flip(bitmask):
            at = int(torch.randint(bitmask.numel(), (), generator=generator))
            bitmask.view(-1)[at] ^= 1 << int(torch.randint(8, (), generator=generator))
            return bitmask

        damage.replace(f"{name}.bitmask", flip)
    found = problems(damage.folder)
    assert len(found) == 4 and all(any(f": {name}: " in problem for problem in found) for name in chosen)


def test_a_permutation_for_an_unknown_linear(damage):
    for part in ("compressed", "bitmask", "shape"):
        damage.replace(f"{Q}.{part}", lambda tensor: None)
        damage.edit_json(INDEX, lambda content: content["weight_map"].pop(f"{Q}.{part}"))
    found = problems(damage.folder)
    assert len(found) == 1 and Q in found[0] and "not a pruned linear" in found[0]


def test_permutations_lost(damage):
    (damage.folder / "permutations.safetensors").unlink()
    assert "permutations.safetensors: missing" in problems(damage.folder)[0]


def other_run(damage):
    """Files of the same model compressed under other orders: each valid by itself."""
    other = damage.folder.with_name("other")
    shutil.copytree(damage.folder, other)
    rewrite(other / "permutations.safetensors", lambda tensors: tensors.update({f"{DOWN}.input_permutation":
        tensors[f"{DOWN}.input_permutation"].flip(0).contiguous()}))  # fmt: skip
    bind(other)
    assert problems(other) == []
    return other


@pytest.mark.parametrize("file", ["permutations.safetensors", "config.json", "model-00003-of-*.safetensors"])
def test_files_of_two_runs(damage, file):
    other = other_run(damage)
    (path,) = other.glob(file)
    shutil.copyfile(path, damage.folder / path.name)
    found = problems(damage.folder)
    assert len(found) == 1 and str(damage.folder) in found[0] and "files of one run" in found[0]
    assert ("permutations.safetensors" if file == "config.json" else path.name) in found[0]


def test_a_folder_without_digests_is_refused(damage):
    damage.edit_json("config.json", lambda c: c["quantization_config"].pop("permutations_digest"))
    found = problems(damage.folder)
    assert len(found) == 1 and "permutations_digest" in found[0] and "Compress the model again" in found[0]


def test_a_shard_without_a_digest_is_refused(damage):
    path = damage.file_of(f"{Q}.compressed")
    save_file(load_file(path), path, metadata={"format": "pt"})
    found = problems(damage.folder)
    assert len(found) == 1 and str(path) in found[0] and "files of one run" in found[0]


@pytest.mark.parametrize("digest", [0, "", "0" * 63, "A" * 64, "0" * 64 + "\n", ["0" * 64]])
def test_an_invalid_digest_is_refused(damage, digest):
    damage.edit_json("config.json", lambda c: c["quantization_config"].update(permutations_digest=digest))
    assert "config.json: quantization_config.permutations_digest" in problems(damage.folder)[0]


@pytest.mark.parametrize("left", ["permutations", "digest"])
def test_a_recipe_that_does_not_permute_has_no_permutations(damage, left):
    """As in a repository into which a run without permutations was uploaded over one with them."""
    damage.edit_json("config.json", lambda c: c["quantization_config"]["recipe"].update(permute="none"))
    if left == "permutations":
        damage.edit_json("config.json", lambda c: c["quantization_config"].pop("permutations_digest"))
    else:
        (damage.folder / "permutations.safetensors").unlink()
    found = problems(damage.folder)
    assert len(found) == 1 and "though the recipe" in found[0] and "files of one run" in found[0]


@pytest.mark.parametrize("file", ["permutations.safetensors", "shard"])
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_files(damage, file, size):
    path = damage.file_of(f"{Q}.compressed") if file == "shard" else damage.folder / file
    content = path.read_bytes()
    path.write_bytes(content[:size])
    found = problems(damage.folder)
    assert len(found) == 1 and str(path) in found[0] and "truncated" in found[0]


def test_missing_shard(damage):
    path = damage.file_of(f"{Q}.compressed")
    path.unlink()
    found = problems(damage.folder)
    assert str(path) in found[0] and "missing" in found[0] and "model.layers." in found[0]


@pytest.mark.parametrize("shard", ["../model-00001-of-00009.safetensors", "/etc/passwd", "..", "sub/x.safetensors", ""])
def test_a_shard_outside_the_folder(damage, shard):
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({f"{Q}.compressed": shard}))
    found = problems(damage.folder)
    assert len(found) == 1 and (repr(shard) in found[0] or "missing" in found[0])


def test_a_tensor_that_is_not_in_its_shard(damage):
    other = damage.file_of(f"{DOWN}.compressed").name
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({f"{Q}.compressed": other}))
    assert f"{Q}.compressed" in problems(damage.folder)[0]


@pytest.mark.parametrize("shard", ["\x1b[2J.safetensors", "a" * 5000, "\ud800", "\0"])
def test_an_odd_name_of_a_shard(damage, shard):
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({f"{Q}.compressed": shard}))
    found = problems(damage.folder)
    assert len(found) == 1 and found[0].isprintable() and "outside the folder" in found[0]


@pytest.mark.parametrize("name", ["\x1b]0;hello\x07", "a\nb", "a" * 1001, "\u202edetsurt"])
@pytest.mark.parametrize("file", ["permutations.safetensors", "shard", "index"])
def test_names_that_would_fool_a_reader(damage, name, file):
    """Escape sequences, new lines, right-to-left marks: nothing of the kind reaches a terminal."""
    if file == "index":
        damage.edit_json(
            INDEX, lambda content: content["weight_map"].update({name: "model-00001-of-00002.safetensors"})
        )
    else:
        path = damage.file_of(f"{Q}.{'compressed' if file == 'shard' else 'input_permutation'}")
        rewrite(path, lambda tensors: tensors.update({name: torch.zeros(2)}))
    found = problems(damage.folder)
    assert len(found) == 1 and found[0].replace("\n", "").isprintable()


def test_a_tensor_that_the_index_does_not_name(damage):
    """Readers that go by files, as transformers and vLLM do, would take it; those that go by the index would not."""
    path = damage.file_of(f"{Q}.compressed")
    rewrite(path, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(258, 128)}))
    found = problems(damage.folder)
    assert len(found) == 1 and str(path) in found[0] and "model.embed_tokens.weight" in found[0]


@pytest.mark.parametrize("name", [f"{Q}.weight", f"{UP}.input_permutation"])
def test_names_that_contradict_each_other(damage, name):
    path = damage.file_of(f"{Q}.compressed")
    rewrite(path, lambda tensors: tensors.update({name: torch.zeros(128, 128)}))
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({name: path.name}))
    found = problems(damage.folder)
    assert len(found) == 1 and name.rpartition(".")[0] in found[0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_tensors_are_checked_too(damage, dtype):
    damage.replace("model.norm.weight", lambda t: t.to(dtype))
    assert problems(damage.folder) == []
    damage.replace("model.norm.weight", lambda t: (t.float() * float("nan")).to(dtype))
    assert "model.norm.weight: a value is NaN" in problems(damage.folder)[0]


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map(damage, weight_map):
    damage.edit_json(INDEX, lambda content: content.update(weight_map=weight_map))
    assert INDEX in problems(damage.folder)[0]


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' * 60 + b"1" + b"}" * 60],
)
def test_files_that_are_not_json_objects(damage, file, content):
    (damage.folder / file).write_bytes(content)
    found = problems(damage.folder)
    assert len(found) == 1 and str(damage.folder / file) in found[0]


def test_a_missing_or_foreign_folder(tmp_path, pruned_llama):
    assert "no such file" in problems(tmp_path / "nowhere")[0]
    assert problems(pruned_llama.source)[0].endswith("not a folder that `ria-vllm compress` wrote.")


@pytest.mark.parametrize("form", ["marlin-24", "pack-quantized", "sparse-24-bitmask"])
def test_a_folder_of_compressed_tensors(tmp_path, form):
    quantization = {"quant_method": "compressed-tensors", "format": form, "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    assert "`vllm serve` takes it with ria-vllm's plugin, if it is 2:4" in problems(tmp_path)[0]
    with pytest.raises(RiaError, match="`inspect`, `verify` and `export` do not read it"):
        Reader(tmp_path)


def test_no_weights(damage):
    for path in damage.folder.glob("model*"):
        path.unlink()
    assert "no weights here" in problems(damage.folder)[0]


def test_a_second_set_of_weights(damage, tmp_path):
    """transformers prefers a single file to an index; without an index, vLLM loads all files."""
    folder, shard = damage.folder, next(iter(damage.folder.glob("model-*")))
    shutil.copyfile(shard, folder / "other.safetensors")
    assert not problems(folder)
    shutil.copyfile(shard, folder / "model.safetensors")
    assert f"model.safetensors: does not belong to {INDEX}, but would be loaded" in problems(folder)[0]
    (folder / "model.safetensors").unlink()
    (folder / INDEX).unlink()
    assert f"neither model.safetensors nor {INDEX}). There is model-00001" in problems(folder)[0]


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "sub/consolidated.safetensors"]
)
def test_weights_in_mistrals_format(damage, name):
    """vLLM would load them in the place of those that the index names."""
    assert not problems(damage.folder)
    (damage.folder / name).parent.mkdir(exist_ok=True)
    save_file({"norm.weight": torch.zeros(4)}, damage.folder / name)
    assert f"{name} makes vLLM take this model for one in Mistral's own format" in problems(damage.folder)[0]


def test_a_stray_file_beside_the_single_one(damage):
    folder = damage.folder
    tensors = {}
    for path in sorted(folder.glob("model-*")):
        tensors |= load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        path.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors", metadata)
    assert not problems(folder)
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    assert "adapter_model.safetensors: does not belong to model.safetensors, but would be" in problems(folder)[0]


def test_a_pruned_linear_that_the_config_calls_dense(damage):
    damage.edit_json("config.json", lambda c: c["quantization_config"]["sparsity_config"]["ignore"].append(Q))
    assert any(Q in p and "ignored" in p for p in problems(damage.folder))


UP_OF_ALL = "model.layers.{i}.mlp.up_proj"


def edit_fold(number, **changes):
    def change(config):
        config["quantization_config"]["folds"][number].update(changes)

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (edit_fold(0, num_heads=None), "do not fit"),
        (edit_fold(0, num_kv_heads=3), "do not fit"),
        (edit_fold(0, num_kv_heads=4), "reorders 128 rows, but model.layers.0.self_attn.v_proj gives it 64"),
        (edit_fold(1, producers=[{"name": "model.layers.{i}.mlp.up_proj", "rows": [0, 500]}]), "rows 0 to 500"),
        (edit_fold(1, producers=[{"name": "model.layers.{i}.mlp.up_proj", "rows": [64, 0]}]), "rows 64 to 0"),
        (edit_fold(1, producers=[{"name": "model.layers.{i}.mlp.up_proj", "rows": [0, 64]}]), "gives it 64"),
        (edit_fold(1, producers=[{"name": "model.layers.{i}.mlp.up_proj"}] * 2), "another fold reorders too"),
        (edit_fold(1, producers=[{"name": UP_OF_ALL, "rows": [0, 5], "blocks": 64}]), "0 to 5 of each of 64 blocks"),
        (edit_fold(1, producers=[{"name": UP_OF_ALL, "rows": [0, 1], "blocks": 64}]), "gives it 64"),
        (edit_fold(1, producers=[{"name": UP_OF_ALL, "rows": [0, 1], "blocks": 7}]), "of each of 7 blocks"),
    ],
)
def test_folds_that_cannot_hold(damage, change, words):
    damage.edit_json("config.json", change)
    found = problems(damage.folder)
    assert found and any(words in problem for problem in found), found
    assert all("model.layers." in problem for problem in found)


def test_linear_refuses_what_problems_reports(damage):
    damage.replace(f"{UP}.bitmask", flip_one_bit)
    with pytest.raises(RiaError, match=f"{UP}.*exactly two"):
        Reader(damage.folder).linear(UP)


def test_single_file_folders(pruned_llama):
    files = weight_files(pruned_llama.source)
    assert set(files) == set(pruned_llama.dense)
    assert {f.name for f in files.values()} == {"model.safetensors"}


def test_report_is_optional(damage):
    assert Reader(damage.folder).report() == {}
    (damage.folder / "ria_report.json").write_text(json.dumps({"linears": {}}))
    assert Reader(damage.folder).report() == {"linears": {}}


@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight"])
def test_one_weight_under_a_short_name_too(damage, name):
    """Loaders add and strip "model."; they could load either."""
    short = name.removeprefix("model.")
    path = damage.file_of("model.norm.weight")
    rewrite(path, lambda tensors: tensors.update({short: torch.zeros(128)}))
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({short: path.name}))
    (found,) = problems(damage.folder)
    assert f"{name} " in found and f" {short} " in found and "both stored, but they are one weight" in found

"""The reader: what it returns equals what was stored, and every way of damaging a folder is found by layer or file."""

import json

import pytest
import torch
from damage import bind, problems, prove, rewrite

from ria_vllm.checkpoint.reader import Reader, is_compressed
from ria_vllm.errors import RiaError

Q, OUT = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
INDEX, PROOFS = "model.safetensors.index.json", "proofs/products.safetensors"


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
        (f"{Q}.bitmask", flip_one_bit, Q, "exactly 2"),
        (f"{Q}.bitmask", move_one_bit, Q, "exactly 2"),
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
        ("model.norm.weight", lambda t: t * float("inf"), "model.norm.weight", "infinite"),
    ],
)
def test_damaged_tensors_are_found_by_layer(damage, tensor, change, layer, words):
    damage.replace(tensor, change)
    bind(damage.folder)
    found = problems(damage.folder)
    assert len(found) == 1 and layer in found[0] and words in found[0], found


@pytest.mark.parametrize(
    "change, words", [(swap_across_heads, "another head"), (differ_within_a_group, "different permutations")]
)
def test_orders_that_no_fold_can_have(damage, change, words):
    damage.replace(f"{OUT}.input_permutation", change)
    bind(damage.folder)
    changed, unfit = problems(damage.folder)
    assert changed == f"{OUT}: its weights are not those that the checkpoint was written with ({PROOFS})"
    prove(damage.folder)
    assert problems(damage.folder) == [unfit] and OUT in unfit and words in unfit


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


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b""), ("config.json", b"[]"), ("config.json", b"[" * 100_000), (INDEX, b"\xff\xfe"),
        (INDEX, b'{"a": ' + b"9" * 5000 + b"}"),
    ],
)  # fmt: skip
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


def test_a_pruned_linear_that_the_config_calls_dense(damage):
    damage.edit_json("config.json", lambda c: c["quantization_config"]["sparsity_config"]["ignore"].append(Q))
    assert any(Q in p and "ignored" in p for p in problems(damage.folder))


def test_linear_refuses_what_problems_reports(damage):
    damage.replace(f"{UP}.bitmask", flip_one_bit)
    with pytest.raises(RiaError, match=f"{UP}.*exactly 2"):
        Reader(damage.folder).linear(UP)

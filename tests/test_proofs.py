"""Proofs: r, products and bounds by brute force, what a folder holds of them, and that any other weight shows."""

import hashlib
import json
import math
import shutil
import struct

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from compressing import run_small
from damage import PROOFS, Damage, bind_proofs, problems, prove, rewrite
from moe import save_moe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.shards import tensor_entries, weights_digest
from ria_vllm.checkpoint.writer import SEED, CheckpointWriter
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.files.open_files import OpenFiles
from ria_vllm.folder_commands import verify
from ria_vllm.format import proofs, sparse24
from ria_vllm.format.formats import FLOAT, FP8, INT8, INTEGERS
from ria_vllm.format.schema import FP8_TOKENS

EPS = 2.0**-23
DOWN, EMBEDDING = "model.layers.0.mlp.down_proj", "model.embed_tokens"


def r_of(size: int, seed: int, signs_only: bool = False) -> list[int]:
    """By definition, channel by channel."""
    drawn, found = hashlib.shake_128(f"ria-vllm proof {seed}".encode()).digest(2 * size), []
    for value, coin in zip(drawn[::2], drawn[1::2], strict=True):
        signed = value - 128 if value < 128 else value - 127  # -128 to 128 without 0
        if signs_only or coin < 128:
            signed = 127 if signed > 0 else -127
        found.append(min(max(signed, -127), 127))
    return found


def proof_of(weight: torch.Tensor, r: list[int]) -> list[tuple[float, float]]:
    """The exact sums of each row, rounded once to float64."""
    found = []
    for row in weight.double().tolist():
        terms = [w * x for w, x in zip(row, r, strict=True)]
        found.append((math.fsum(terms), math.sqrt(math.fsum(term * term for term in terms))))
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signs_only", [False, True])
@pytest.mark.parametrize("size, seed", [(0, 1), (1, 1), (96, 1), (4096, 0), (5000, 2**32 - 1)])
def test_the_vector(size, seed, signs_only):
    r = proofs.vector(size, seed, signs_only)
    assert r.dtype == torch.float32 and r.tolist() == r_of(size, seed, signs_only)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(r.to(dtype).float(), r)
    assert torch.equal(proofs.vector(size + 77, seed, signs_only)[:size], r)
    assert not signs_only or set(r.abs().tolist()) == ({127} if size else set())


def test_the_vector_of_our_folders():
    """Every part of 32 channels has a largest one, of all that a rank may have, and no channel goes unseen."""
    r = proofs.vector(1 << 17, SEED)
    assert bool((r.view(-1, 32).abs().amax(1) == 127).all()) and bool((r != 0).all())
    assert len(set(r.tolist())) == 254 and abs(r.mean()) < 1


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 17])
def test_products(dtype, transposed, chunk, monkeypatch):
    monkeypatch.setattr(proofs, "_CHUNK", chunk)
    weight = (normal(40, 96) * torch.logspace(-3, 1, 40)[:, None]).to(dtype)
    weight = weight.T if transposed else weight
    before = weight.clone()
    found = proofs.proof(weight, proofs.vector(weight.shape[1], 3))
    exact = torch.tensor(proof_of(weight, r_of(weight.shape[1], 3)), dtype=torch.float64)
    assert found.dtype == torch.float32 and torch.equal(weight.double(), before.double())
    # Rounded once to float32: half a unit, and what float64 is off where terms cancel.
    assert bool(((found - exact).abs() <= EPS / 2 * 1.01 * exact.abs() + 1e-12 * exact[:, 1:]).all())


def sums_in_float32(terms: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of each row of float32 terms, in orders that do not depend on them."""
    size, random = terms.shape[1], np.random.default_rng(0)
    orders = {"forwards": np.arange(size), "backwards": np.arange(size)[::-1], "random": random.permutation(size)}
    found = {name: terms[:, order].cumsum(1, dtype=np.float32)[:, -1] for name, order in orders.items()}
    found["in four lanes"] = terms.reshape(-1, size // 4, 4).cumsum(1, dtype=np.float32)[:, -1].sum(1)
    return found


@pytest.mark.parametrize("size", [64, 1024, 8192])
def test_sums_in_any_order_are_within_the_bound(size):
    weight = normal(300, size) * torch.logspace(-6, 3, 300)[:, None]
    r = proofs.vector(size, 1)
    proof = proofs.proof(weight, r)
    limit = proofs.bound(proof, size, torch.float32)
    found = {name: torch.from_numpy(y) for name, y in sums_in_float32((weight * r).numpy()).items()}
    for name, products in (found | {"torch": weight @ r}).items():
        assert bool(((products - proof[:, 0]).abs() <= limit).all()), name
    assert bool((limit <= 2e-4 * (1 + proof[:, 0].abs() / proof[:, 1]) * proof[:, 1]).all())


def one_scale_per_row(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 10
    return (weight / scale).round().clamp(-8, 7) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("integers", [False, True])
def test_rounded_weights_and_outputs_are_within_the_bound(dtype, integers):
    """Rows of very different norms, of which half the weights are pruned."""
    for seed in range(12):
        size = [64, 192, 576, 1536][seed % 4]
        weight = normal(1000, size, seed=seed) * torch.logspace(-7, 1, 1000)[:, None]
        weight = (one_scale_per_row(weight) if integers else weight) * (normal(1000, size, seed=seed + 99) > 0)
        r = proofs.vector(size, seed)
        proof = proofs.proof(weight, r)
        # serve divides r, so that products fit into float16.
        products = (weight.to(dtype).double() @ (r.double() / 128)).to(dtype).double() * 128
        assert bool(((products - proof[:, 0]).abs() <= proofs.bound(proof, size, dtype)).all()), seed


def exchanged(weight: torch.Tensor) -> torch.Tensor:
    weight[:, [5, 6]] = weight[:, [6, 5]]
    return weight


def one_row(weight: torch.Tensor) -> torch.Tensor:
    weight[7] = normal(weight.shape[1], seed=9)
    return weight


@pytest.mark.parametrize(
    "change, dtype",
    [
        (lambda w: w[:, torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1))], torch.bfloat16),
        (lambda w: w.roll(1, 0), torch.bfloat16),
        (lambda w: w.roll(1, 1), torch.bfloat16),
        (lambda w: w.flip(0), torch.bfloat16),
        (lambda w: w * 1.1, torch.bfloat16),
        (one_row, torch.bfloat16),
        (exchanged, torch.float32),
    ],
)
@pytest.mark.parametrize("size", [64, 4096])
def test_another_matrix_is_not(change, dtype, size):
    weight, r = normal(64, size), proofs.vector(size, SEED)
    assert r[5] != r[6]
    proof = proofs.proof(weight, r)
    found = proofs.proof(change(weight.clone()), r)
    assert not proofs.agree(found, proof)
    wrong = (found - proof)[:, 0].abs() > proofs.bound(proof, size, dtype)
    if change is one_row:
        assert wrong.nonzero().flatten().tolist() == [7]
    else:
        assert wrong.float().mean() > 0.8


def test_proofs_agree_however_they_were_summed():
    weight, r = normal(200, 4096).bfloat16(), proofs.vector(4096, SEED)
    found = proofs.proof(weight, r)
    exact = torch.tensor(proof_of(weight, r_of(4096, SEED)))
    assert proofs.agree(found, exact) and proofs.agree(exact, found)
    for row, column in ((0, 0), (77, 1234), (199, 4095)):
        other = weight.clone()
        other.view(torch.int16)[row, column] ^= 8
        assert not proofs.agree(proofs.proof(other, r), found)
    assert not proofs.agree(found[:-1], found) and not proofs.agree(found * torch.tensor([1, 1.001]), found)


def test_what_is_no_proof():
    assert proofs.check(torch.zeros(3, 2)) is None
    assert "expected torch.float32 [out, 2]" in proofs.check(torch.zeros(3, 2).double())
    assert "(3, 3)" in proofs.check(torch.zeros(3, 3)) and "(2,)" in proofs.check(torch.zeros(2))
    assert "NaN" in proofs.check(torch.tensor([[0, float("nan")]]))


def test_the_digest():
    found = {"b.c": normal(3, 2), "b": normal(1, 2, seed=1), "ä": normal(2, 2, seed=2)}
    content = b"".join(
        name.encode() + b"\0" + struct.pack(f"<{2 * len(found[name])}f", *found[name].flatten().tolist())
        for name in ("b", "b.c", "ä")
    )
    assert proofs.digest(found) == hashlib.sha256(content).hexdigest()


def check_folder(reader: Reader, dense: dict[str, torch.Tensor], signs_only: bool = False) -> None:
    """The folder has the proof of each of the matrices `dense` and no other, by sums in float64."""
    stored = load_file(reader.folder / PROOFS)
    assert stored.keys() == {f"{name}.proof" for name in dense}
    for name, weight in dense.items():
        r = torch.tensor(r_of(weight.shape[1], SEED, signs_only), dtype=torch.float64)
        exact = torch.stack([weight.double() @ r, (weight.double() * r).norm(dim=1)], 1)
        off = (stored[f"{name}.proof"] - exact).abs()
        assert bool((off <= 2 * EPS * exact.abs().sum(1, keepdim=True)).all()), name


def matrices(folder) -> dict[str, torch.Tensor]:
    """Module -> weight, float64, of the dense model as transformers loads it."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()
    return {name.removesuffix(".weight"): weight for name, weight in state.items() if weight.dim() == 2}


def written(like: Reader, out, format, **more: torch.Tensor) -> Reader:
    """A folder that the writer has made, with the same model's weights in another format; a dense model in float32."""
    units = {name: like.tensor(name) for name in like.dense_names}
    for name in like.sparse_names:
        linear = like.linear(name)
        values, scales = format.quantize(linear.stored(), linear.dtype)
        parts = format.encode(values, sparse24.mask_from_bitmask(linear.parts["bitmask"]), scales)
        units |= linear.tensors() | {f"{name}.{part}": tensor for part, tensor in parts.items()}
    quantization = like.config["quantization_config"] | {"weights": {**format.quantization, "dtype": "float32"}}
    if format is FP8:
        quantization["input_activations"] = FP8_TOKENS.model_dump()
    writer = CheckpointWriter(out)
    writer.write("all", units | more)
    writer.finish(["all"], {"config.json": like.config | {"quantization_config": quantization}}, {}, 1 << 40, True)
    return Reader(out)


@pytest.mark.parametrize("format", [FLOAT, INT8, INTEGERS[4, None], INTEGERS[4, 32], FP8], ids=lambda f: f.name)
def test_a_folder_has_a_proof_of_every_matrix(pruned_llama, tmp_path, format):
    reader = Reader(pruned_llama.folder)
    reader = reader if format is FLOAT else written(reader, tmp_path / "out", format)
    export_dense(reader, tmp_path / "dense", 1 << 40)
    dense = matrices(tmp_path / "dense")
    assert len(dense) == 14 + 2  # the embedding and the head
    check_folder(reader, dense, signs_only=format is FP8)
    assert list(reader.problems()) == []
    entry = json.loads((reader.folder / "config.json").read_text())["quantization_config"]["proofs"]
    assert entry == {"seed": SEED, "digest": proofs.digest(reader.proofs())}


def test_a_convolution_is_proved_as_a_matrix(pruned_llama, tmp_path, monkeypatch):
    weight = torch.randn(300, 1, 4)
    reader = written(Reader(pruned_llama.folder), tmp_path / "out", INT8, **{"model.conv1d.weight": weight})
    r = torch.tensor(r_of(4, SEED, False), dtype=torch.float64)
    torch.testing.assert_close(reader.proofs()["model.conv1d"][:, 0].double(), weight[:, 0].double() @ r)
    assert list(reader.problems()) == []
    monkeypatch.setattr(OpenFiles, "read", damaged(OpenFiles.read, "model.conv1d.weight"))
    (problem,) = reader.problems()
    assert problem.startswith("model.conv1d: its weights are not those")


def damaged(read, name):
    def damaged_read(self, path, wanted, index=None):
        found = read(self, path, wanted, index)
        return found.roll(1, 0) if wanted == name else found

    return damaged_read


def test_a_row_that_is_not_finite_does_not_make_the_folder_unreadable(damage, tmp_path):
    def change(weight):
        weight[99, 5] = math.nan
        return weight

    damage.replace(f"{EMBEDDING}.weight", change)
    reader = written(Reader(damage.folder), tmp_path / "out", INT8)
    assert EMBEDDING not in reader.proofs() and len(reader.proofs()) == 14 + 1
    (found,) = reader.problems()
    assert found.endswith(f"{EMBEDDING}.weight: a value is NaN or infinite")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert int(state[f"{EMBEDDING}.weight"].isnan().sum()) == 1


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def moe(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    (place / "text.txt").write_text("Many words are written here, and then some more of them. " * 40)
    run_small(save_moe(place / "in", request.param), place / "out", place / "text.txt")
    return Reader(place / "out")


def one_by_one(dense: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The dense model's matrices, with each expert's in place of those that stack them."""
    found = dict(dense)
    for name, weight in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "down_proj" and weight.dim() == 3:
            for expert, (down, gate_up) in enumerate(zip(weight, state[f"{module}.gate_up_proj"], strict=True)):
                is_gpt_oss = f"{module}.gate_up_proj_bias" in state
                gate_up, down = (gate_up.T, down.T) if is_gpt_oss else (gate_up, down)
                gate, up = (gate_up[::2], gate_up[1::2]) if is_gpt_oss else gate_up.chunk(2)
                linears = {"gate_proj": gate, "up_proj": up, "down_proj": down, "down_proj.transposed": down.T}
                found |= {f"{module}.{expert}.{linear}": matrix for linear, matrix in linears.items()}
    return found


def test_each_expert_has_its_own(moe, tmp_path):
    export_dense(moe, tmp_path / "dense", 1 << 40)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64).state_dict()
    dense = {
        name.removesuffix(".weight"): weight
        for name, weight in state.items()
        if weight.dim() == 2 and name.endswith(".weight")
    }
    check_folder(moe, one_by_one(dense, state))
    assert list(moe.problems()) == []


def test_transformers_refuses_experts_in_each_others_places(moe, tmp_path):
    shutil.copytree(moe.folder, tmp_path / "out")

    def exchange(tensors):
        names = [name for name in tensors if ".layers.1." in name and ".experts.2.down_proj." in name]
        for name in names:
            other = name.replace(".experts.2.", ".experts.3.")
            tensors[name], tensors[other] = tensors[other], tensors[name]
        assert names

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rewrite(tmp_path / "out" / "model.safetensors", exchange)
    with pytest.raises(RiaError, match=r"model.safetensors: .*layers.1.*experts.2.down_proj: what was loaded is not"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("tensor", [f"{EMBEDDING}.weight", f"{DOWN}.compressed"])
def test_verify_finds_a_single_value(damage, tensor):
    """Wherever it is: `weights_digest` is the same for what comes after the first 65,536 bytes of a tensor."""
    name, _, part = tensor.rpartition(".")
    draw = torch.Generator().manual_seed(0)
    path = damage.file_of(tensor)
    sound = path.read_bytes()
    before = weights_digest(tensor_entries(path))
    for _ in range(5):

        def change_sign(values):
            rows = values[-1:] if part == "weight" else values  # of the embedding, these come after them
            column = int(torch.randint(values.shape[1], (), generator=draw))
            rows[int(torch.randint(len(rows), (), generator=draw)), column] *= -1
            return values

        damage.replace(tensor, change_sign)
        assert path.read_bytes() != sound
        assert part != "weight" or weights_digest(tensor_entries(path)) == before
        result = CliRunner().invoke(verify, [str(damage.folder)])
        assert result.exit_code == 1 and result.output.splitlines() == [
            f"{name}: its weights are not those that the checkpoint was written with ({PROOFS})",
            f"{damage.folder}: 1 problem",
        ]
        path.write_bytes(sound)


def test_a_missing_proofs_file(damage):
    (damage.folder / PROOFS).unlink()
    assert problems(damage.folder) == [
        f"{damage.folder}: {PROOFS} is missing, though config.json names it. Get all files of one run, or compress the "
        "model again."
    ]


@pytest.mark.parametrize(
    "change, words",
    [
        ({f"{DOWN}.proof": torch.zeros(3, 3)}, f"{DOWN}: not a proof: torch.float32 (3, 3)"),
        ({f"{DOWN}.proof": torch.full((3, 2), math.inf)}, f"{DOWN}: not a proof: a value is NaN or infinite"),
        ({"other": torch.zeros(3, 2)}, "other: unknown name"),
    ],
)
def test_a_damaged_proofs_file(damage, change, words):
    rewrite(damage.folder / PROOFS, lambda tensors: tensors.update(change))
    (found,) = problems(damage.folder)
    assert str(damage.folder / PROOFS) in found and words in found


def test_a_matrix_without_a_proof(damage):
    rewrite(damage.folder / PROOFS, lambda tensors: tensors.pop(f"{DOWN}.proof"))
    bind_proofs(damage.folder)
    assert problems(damage.folder) == [f"{DOWN}: no proof of it in {PROOFS}"]


def test_a_proof_without_its_matrix(damage):
    """Its tensors may be lost without a trace: a shard, with its entries in the index."""
    damage.replace("lm_head.weight", lambda tensor: None)
    damage.edit_json("model.safetensors.index.json", lambda content: content["weight_map"].pop("lm_head.weight"))
    assert problems(damage.folder) == [f"lm_head: missing, though {PROOFS} has its proof"]


def flip(damage: Damage, tensor: str, row: int) -> None:
    def change_signs(values):
        values[row] *= -1
        return values

    damage.replace(tensor, change_signs)


@pytest.mark.parametrize(
    ("tensor", "dtype"), [(f"{DOWN}.compressed", torch.float16), (f"{EMBEDDING}.weight", torch.bfloat16)], ids=str
)
def test_transformers_refuses_other_weights(damage, monkeypatch, tensor, dtype):
    name, path = tensor.rpartition(".")[0], damage.file_of(tensor)
    flip(damage, tensor, 11)
    with pytest.raises(RiaError, match="what was loaded is not the matrix") as caught:
        AutoModelForCausalLM.from_pretrained(damage.folder, dtype=dtype)
    message = str(caught.value)
    assert message.startswith(f"{path}: {name}: ") and PROOFS in message
    assert all(way in message for way in ("`ria-vllm verify`", "`ria-vllm export`", "RIA_VLLM_PROOF=0"))
    monkeypatch.setenv("RIA_VLLM_PROOF", "0")
    loaded = AutoModelForCausalLM.from_pretrained(damage.folder, dtype=dtype)
    monkeypatch.setenv("RIA_VLLM_PROOF", "no")
    with pytest.raises(RiaError, match="RIA_VLLM_PROOF=no"):
        AutoModelForCausalLM.from_pretrained(damage.folder)
    monkeypatch.delenv("RIA_VLLM_PROOF")
    prove(damage.folder)
    again = AutoModelForCausalLM.from_pretrained(damage.folder, dtype=dtype).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in loaded.state_dict().items())


def test_parameters_that_are_elsewhere_are_passed_over(damage, tmp_path):
    """What is offloaded to the disk is not read again."""
    flip(damage, "model.layers.1.mlp.up_proj.compressed", 3)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    assert AutoModelForCausalLM.from_pretrained(damage.folder, **options).device.type == "cpu"
    flip(damage, f"{DOWN}.compressed", 3)
    with pytest.raises(RiaError, match=f"{DOWN}: what was loaded is not"):
        AutoModelForCausalLM.from_pretrained(damage.folder, **options)

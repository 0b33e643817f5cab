"""`ria-vllm doctor OUT`: kernels that compute what a folder says, and each kind of kernel that does not.

The folders' proofs are those that the writer made, of the decoded weights in float64.
"""

import json
import re
import subprocess
import sys

import pruned_moe
import pytest
import tiny
import torch
from click.testing import CliRunner
from damage import bind_proofs, rewrite

from ria_vllm.checkpoint.weight_files import SINGLE_FILE
from ria_vllm.errors import RiaError
from ria_vllm.serve.doctor import doctor
from ria_vllm.serve.kernels.cpu.backend import CpuKernel
from ria_vllm.serve.kernels.reference import ReferenceKernel

DOWN = "model.layers.1.mlp.down_proj"
ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA = tiny.FAMILIES["llama-gqa"]


def run(folder, *options):
    return CliRunner().invoke(doctor, [str(folder), "--device", "cpu", *options], catch_exceptions=False)


def proved(output):
    return output.partition("\nproofs of ")[2]


def wrong(output):
    """The ends of the names of linears that are said to be wrong."""
    lines = [line for line in proved(output).splitlines() if line.startswith("  wrong: ")]
    return sorted(line.split()[1].removesuffix(":").rpartition(".")[2] for line in lines)


@pytest.mark.parametrize("backend", [CpuKernel.name, ReferenceKernel.name])
@pytest.mark.parametrize("weights, rounded", [("float", False), ("int4-g32", True), ("fp8", False)])
def test_all_linears_are_proved(tmp_path, monkeypatch, weights, rounded, backend):
    monkeypatch.setenv("RIA_VLLM_BACKEND", backend)
    tiny.write(LLAMA, tmp_path / "out", weights=weights, rounded=rounded)
    for dtype in ("bfloat16", "float16", "float32"):
        found = run(tmp_path / "out", "--dtype", dtype)
        assert found.exit_code == 0, found.output
        assert f"14 pruned linears compute what the checkpoint says (14 by {backend}" in proved(found.output)
        assert f", {dtype} activations)" in proved(found.output)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_kernels_are_those_for_activations_of_the_models_own_dtype(tmp_path, weights):
    tiny.write(LLAMA, tmp_path / "out", dtype=torch.float16, weights=weights)
    found = run(tmp_path / "out").output
    assert " linear of float16" in found and ", float16 activations)" in proved(found)


def rows_in_another_order(y, config, x, p):
    y.copy_(y.roll(1, -1))


def wrong_for_many_tokens(y, config, x, p):
    if len(x) > 1:
        y[-1] = 0


def failing(y, config, x, p):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rows_in_another_order, r"25\d of its 256 rows"),
        (wrong_for_many_tokens, r"25\d of its 256 rows"),
        (failing, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_kernel_that_is_wrong_is_named_with_its_linears(checkpoint, monkeypatch, damage, said):
    spoil(monkeypatch, damage)
    found = run(checkpoint)
    assert found.exit_code == 1 and wrong(found.output) == ["gate_proj"] * 2 + ["up_proj"] * 2
    first = next(line for line in proved(found.output).splitlines() if "wrong" in line)
    assert re.search(rf"gate_proj.*: {said}", first)
    assert "  10 pruned linears compute what the checkpoint says" in found.output


def test_a_folder_of_another_pattern(tmp_path, monkeypatch):
    tiny.write(LLAMA, tmp_path / "out", weights="int8", rounded=True, pattern="8:16")
    found = run(tmp_path / "out", "--scheme", "W8A8")
    assert found.exit_code == 0 and "14 pruned linears compute what the checkpoint says (" in proved(found.output)
    assert "int8 weights in 8:16, inputs rounded to int8 on cpu" in found.output
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(RiaError, match=r"out is pruned to 8:16, which only CPUs .*--pattern 2:4.*RIA_VLLM_DENSE=1"):
        CliRunner().invoke(doctor, [str(tmp_path / "out"), "--device", "cuda"], catch_exceptions=False)


def spoil(monkeypatch, damage):
    """Damages what layers of 256 rows and 128 columns compute, of which the self-test knows nothing."""
    apply = CpuKernel.apply

    def spoiled(config, x, packed, input_permutation, bias):
        y = apply(config, x, packed, input_permutation, bias)
        if (config.out_features, config.in_features) == (tiny.INNER, tiny.HIDDEN):
            damage(y, config, x, input_permutation)
        return y

    monkeypatch.setattr(CpuKernel, "apply", staticmethod(spoiled))


def test_a_kernel_that_gathers_otherwise_is_named_with_the_linears_that_gather(checkpoint, monkeypatch):
    """Not with those whose permutation is folded into the layers before."""
    apply = CpuKernel.apply
    monkeypatch.setattr(
        CpuKernel, "apply", staticmethod(lambda config, x, packed, p, bias: apply(config, x, packed, None, bias))
    )
    found = run(checkpoint)
    assert found.exit_code == 1 and wrong(found.output) == sorted(2 * [*ENDS[:3], "gate_proj", "up_proj"])


def test_other_weights_than_were_written_are_named(copy):
    rewrite(copy / SINGLE_FILE, lambda tensors: tensors[f"{DOWN}.compressed"].mul_(2))
    found = run(copy)
    assert found.exit_code == 1 and wrong(found.output) == ["down_proj"]
    assert "  13 pruned linears" in found.output


def test_linears_that_cannot_be_read_or_served_are_named(copy, monkeypatch):
    rewrite(copy / SINGLE_FILE, lambda tensors: tensors[f"{DOWN}.bitmask"].fill_(1))
    found = run(copy)
    assert found.exit_code == 1 and f"{DOWN}: row 0, columns 0 to 7: a group of 4 without exactly" in proved(
        found.output
    )
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cutlass")
    found = run(copy)
    assert found.exit_code == 1 and f"  wrong: {DOWN.replace('1', '0')}: RIA_VLLM_BACKEND=cutlass" in found.output
    assert "  0 pruned linears compute what the checkpoint says, " in found.output


@pytest.mark.parametrize("change", [lambda proof: None, lambda proof: proof[:-1].contiguous()])
def test_a_linear_without_its_proof_is_named(copy, change):
    def edit(tensors):
        proof = change(tensors.pop(f"{DOWN}.proof"))
        tensors.update({} if proof is None else {f"{DOWN}.proof": proof})

    rewrite(copy / "proofs/products.safetensors", edit)
    with pytest.raises(RiaError, match="from another run"):
        run(copy)
    bind_proofs(copy)
    found = run(copy)
    assert found.exit_code == 1 and wrong(found.output) == ["down_proj"]
    assert "no proof of its 128 rows in proofs/products.safetensors" in found.output


def test_a_folder_without_proofs(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["proofs"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RiaError, match=r"it has no proofs .* Compress the model again"):
        run(copy)


def test_experts_are_left_to_the_server(tmp_path):
    family = pruned_moe.FAMILIES["mixtral"]
    out, _ = pruned_moe.write(family, tmp_path)
    found = run(out)
    count = 2 * pruned_moe.EXPERTS * len(family.linears)  # in two layers
    assert found.exit_code == 0 and "  0 pruned linears compute what the checkpoint says, " in found.output
    assert f"  {count} linears of experts were left out: a server proves them" in found.output


def test_vllm_is_not_needed(checkpoint):
    """Nor waited for."""
    code = "import sys; from ria_vllm.serve.doctor import doctor; sys.modules['vllm'] = None; doctor()"
    command = [sys.executable, "-c", code, str(checkpoint), "--device", "cpu"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0 and "  14 pruned linears compute" in found.stdout, found.stderr

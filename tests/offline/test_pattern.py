"""4:8 and 8:16 from `compress` to every reader. The oracle reads masks bit by bit and multiplies in float64."""

import pytest
import torch
from click.testing import CliRunner
from compressing import TOKENS, Settings, edit_config, interrupted_after_a_layer, run_small, weight_digests
from distilling import run as distill
from moe import save_moe
from sparse_llama import masks
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.folder_commands import inspect, verify
from ria_vllm.format.pattern import PATTERNS, TWO_OF_FOUR, Pattern
from ria_vllm.format.token_rounding import round_tokens
from ria_vllm.offline.commands import compress
from ria_vllm.training import keep_sparse, save

W8A8 = {"weights": "int8", "activations": "int8"}
W4A8 = {"weights": "int4", "group_size": 32, "activations": "int8"}
WIDE = PATTERNS["8:16"]


def command(*arguments):
    return CliRunner().invoke(compress, [*map(str, arguments)])


def check_masks(folder, pattern: Pattern) -> Reader:
    """Every group of every linear keeps half, and in some group no narrower pattern does. The permutation is real."""
    reader = Reader(folder)
    assert list(reader.problems()) == [] and reader.schema.pattern == pattern
    for name in reader.sparse_names:
        bits = torch.stack([reader.tensor(f"{name}.bitmask") >> i & 1 for i in range(8)], -1).flatten(1)
        assert bool((bits.view(-1, pattern.of).sum(1) == pattern.kept).all())
        assert not bool((bits.view(-1, pattern.of // 2).sum(1) == pattern.kept // 2).all())
    return reader


@pytest.mark.parametrize(("pattern", "scheme"), [("4:8", "W8A8"), ("8:16", "W4A8"), ("8:16", "BF16"), ("4:8", "W4A16")])
def test_from_the_command_to_transformers(pattern, scheme, tiny, text, tmp_path):
    out = tmp_path / "out"
    given = ("--scheme", scheme, "--effort", "fast", "--data", text, "--samples", 4, "--seq-len", 32)
    found = command(tiny("llama"), "-o", out, "--pattern", pattern, *given)
    assert found.exit_code == 0, found.output
    reader = check_masks(out, PATTERNS[pattern])
    assert reader.permuted_names and reader.schema.recipe["pattern"] == pattern
    assert f"pruned to {pattern}" in (out / "README.md").read_text()
    assert CliRunner().invoke(verify, [str(out)]).exit_code == 0
    assert f"{scheme}, {pattern}:" in CliRunner().invoke(inspect, [str(out)]).output
    model, products = AutoModelForCausalLM.from_pretrained(out), {}
    for name in reader.sparse_names:
        record = lambda _, args, y, n=name: products.update({n: (args[0], y)})  # noqa: E731
        model.get_submodule(name).register_forward_hook(record)
    with torch.no_grad():
        model(TOKENS)
    for name, (x, y) in products.items():  # a forward hook gets what the hooks before it have rounded
        assert torch.equal(x, round_tokens(x)) == scheme.endswith("A8")
        torch.testing.assert_close(y.double(), x.double() @ reader.dense(name).double().T, rtol=1e-4, atol=1e-5)
    assert len(products) == len(reader.sparse_names)


def test_wider_patterns_retain_more(tiny, text, tmp_path):
    kept = []
    for pattern in PATTERNS.values():
        report, _ = run_small(tiny("llama"), tmp_path / str(pattern.of), text, pattern=pattern, **W8A8)
        kept.append(sum(record["retained_after"] for record in report["linears"].values()) / len(report["linears"]))
    assert kept[0] + 0.01 < kept[1] < kept[2] - 0.005, kept


@pytest.mark.slow
def test_training_resumes_and_what_is_made_of_the_folder_keeps_the_masks(tiny, text, tmp_path):
    options = {"pattern": WIDE, "reconstruct": "short", "rotate": "heads"} | W4A8
    run_small(tiny("llama"), tmp_path / "whole", text, **options)
    with interrupted_after_a_layer():
        run_small(tiny("llama"), tmp_path / "out", text, **options)
    with pytest.raises(RiaError, match="pattern"):
        run_small(tiny("llama"), tmp_path / "out", text, Settings(resume=True), **options | {"pattern": TWO_OF_FOUR})
    run_small(tiny("llama"), tmp_path / "out", text, Settings(resume=True), **options)
    assert weight_digests(tmp_path / "out") == weight_digests(tmp_path / "whole")
    reader, kept = check_masks(tmp_path / "out", WIDE), masks(tmp_path / "out")
    assert any(record.get("trained") for record in reader.report()["linears"].values())

    distill(tiny("llama"), tmp_path / "out", tmp_path / "distilled", text, lr=2e-2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    keep_sparse(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    save(model, tmp_path / "tuned", tmp_path / "out")
    for made in ("distilled", "tuned"):
        other = check_masks(tmp_path / made, WIDE)
        assert all(torch.equal(mask, masks(tmp_path / made)[name]) for name, mask in kept.items())
        assert any(not torch.equal(other.dense(name), reader.dense(name)) for name in reader.sparse_names)


@pytest.mark.parametrize("reconstruct", ["none", "block"])
def test_experts(reconstruct, text, tmp_path):
    run_small(save_moe(tmp_path / "dense", "mixtral"), tmp_path / "out", text, pattern=WIDE, reconstruct=reconstruct)
    reader = check_masks(tmp_path / "out", WIDE)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).model.layers[0].mlp.experts
    name = "model.layers.0.block_sparse_moe.experts.1"
    assert torch.equal(weights.down_proj[1], reader.dense(f"{name}.w2"))
    assert torch.equal(weights.gate_up_proj[1], torch.cat([reader.dense(f"{name}.w{i}") for i in (1, 3)]))


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_what_has_the_pattern_already_keeps_its_zeros(pattern, tiny, text, tmp_path):
    """A model that is 2:4 is 8:16, too."""
    plain = {"pattern": PATTERNS[pattern], "permute": "none", "rotate": "none"}
    run_small(tiny("llama"), tmp_path / "first", text, **plain)
    export_dense(Reader(tmp_path / "first"), tmp_path / "dense", 1 << 40)
    report, _ = run_small(tmp_path / "dense", tmp_path / "again", text, pattern=WIDE)
    before, after = Reader(tmp_path / "first"), Reader(tmp_path / "again")
    assert list(after.problems()) == [] and after.schema.pattern == WIDE
    assert report["kept"] == {"linears": len(before.sparse_names), "pruned": 0}
    assert all(torch.equal(after.dense(name), before.dense(name)) for name in before.sparse_names)


def test_a_folder_that_is_called_a_narrower_pattern_is_refused(tiny, text, tmp_path):
    run_small(tiny("llama"), tmp_path / "out", text, pattern=WIDE, **W8A8)
    config = Reader(tmp_path / "out").config["quantization_config"]
    config["sparsity_config"]["sparsity_structure"] = "2:4"
    edit_config(tmp_path / "out", quantization_config=config)
    with pytest.raises(RiaError, match=r"_proj: row 0, columns \d+ to \d+: a group of 4 without exactly 2 kept values"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "a group of 4 without" in CliRunner().invoke(verify, [str(tmp_path / "out")]).output

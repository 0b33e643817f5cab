"""The dtype to compute in: how it is chosen, and that weights are still written in the model's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressing import digests, interrupted_after_a_layer
from safetensors.torch import load_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline.evaluation.evaluate import evaluate
from ria_vllm.offline.model.run import dtypes
from ria_vllm.offline.model.run.dtypes import choose_dtype, fast_bf16
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAST, SLOW = frozenset({"avx2", "avx512f", "avx512_bf16"}), frozenset({"avx2", "avx512f"})


@pytest.fixture
def slow(monkeypatch):
    """A CPU without instructions for bfloat16."""
    monkeypatch.setattr(dtypes, "_cpu_flags", lambda: SLOW)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(dtypes, "_cpu_flags", lambda: FAST)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def stored_bf16(make_model, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bf16") / "model", "llama", dtype=BF16)


def run(model: Path, out: Path, text: Path, settings: Settings = Settings(), **options) -> None:
    recipe = Recipe(**{"calibration": str(text), "samples": 40, "seq_len": 64} | options)
    compress(str(model), out, recipe, settings, Monitor())


def recipe_of(folder: Path) -> dict:
    return Reader(folder).schema.recipe


@pytest.mark.parametrize(
    ("flags", "variables", "expected"),
    [
        (FAST, {}, True),
        (SLOW, {}, False),
        (frozenset({"asimd", "bf16"}), {}, True),  # Arm
        (frozenset(), {}, False),
        (FAST, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (FAST, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, False),
        (FAST, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False),
        (FAST, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "DNNL_MAX_CPU_ISA": "AVX2"}, True),
        (FAST, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
    ],
)
def test_instructions_for_bf16_and_what_forbids_them(flags, variables, expected, fast, monkeypatch):
    monkeypatch.setattr(dtypes, "_cpu_flags", lambda: flags)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fast_bf16(CPU) is expected


def test_agrees_with_onednn_on_this_machine():
    """Never yes if oneDNN says no, and no if oneDNN is limited to AVX2."""
    code = "import torch; from ria_vllm.offline.model.run.dtypes import fast_bf16; "
    code += "print(fast_bf16(torch.device('cpu')), torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    for variables in ({}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}):
        environment = os.environ | variables
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        ours, theirs = done.stdout.split()
        assert theirs == "True" or ours == "False"
        if variables:
            assert ours == "False"


def test_choices(slow, monkeypatch):
    assert choose_dtype(BF16, CPU) == FP32
    assert choose_dtype(BF16, CPU, "bfloat16") == BF16
    monkeypatch.setattr(dtypes, "_cpu_flags", lambda: FAST)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert choose_dtype(BF16, CPU) == BF16 and choose_dtype(BF16, CPU, "float32") == FP32
    assert choose_dtype(FP16, CPU) == FP32 and choose_dtype(FP32, CPU) == FP32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert choose_dtype(BF16, CUDA) == BF16 and choose_dtype(FP16, CUDA) == FP16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_dtype(BF16, CUDA) == FP32  # before 8.0


def test_choices_for_training(slow, monkeypatch):
    """Never float16; bfloat16 for it where that is fast, or asked for. What else is stored is not rounded."""
    assert choose_dtype(FP16, CPU, training=True) == FP32
    assert choose_dtype(FP16, CPU, "bfloat16", training=True) == BF16
    monkeypatch.setattr(dtypes, "_cpu_flags", lambda: FAST)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert choose_dtype(FP16, CPU, training=True) == BF16
    assert choose_dtype(FP16, CPU, "float32", training=True) == FP32
    assert choose_dtype(FP16, CPU, "float16", training=True) == FP32
    assert choose_dtype(FP32, CPU, training=True) == FP32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert choose_dtype(FP16, CUDA, training=True) == BF16
    with pytest.raises(RiaError, match="the weights are float32"):
        choose_dtype(FP32, CPU, "bfloat16", training=True)


@pytest.mark.parametrize(
    ("stored", "asked"), [(FP32, "bfloat16"), (FP32, "float16"), (BF16, "float16"), (FP16, "bfloat16")]
)
def test_a_dtype_that_would_round_the_weights_is_refused(stored, asked):
    name = name_of(stored)
    with pytest.raises(RiaError, match=f"--compute-dtype {asked}: the weights are {name}.* Give .*float32"):
        choose_dtype(stored, CPU, asked)


@pytest.mark.parametrize("options", [{"reconstruct": "block"}], ids=str)
def test_computed_in_float32_it_is_written_in_bf16(options, slow, stored_bf16, text, tmp_path, monkeypatch, capsys):
    seen = set()
    load_layer = StreamedModel.load_layer

    def watch(self, index):
        layer = load_layer(self, index)
        seen.update(parameter.dtype for parameter in layer.parameters())
        return layer

    monkeypatch.setattr(StreamedModel, "load_layer", watch)
    run(stored_bf16, tmp_path / "auto", text, **options)
    assert seen == {FP32}
    assert "computing in float32, writing bfloat16" in capsys.readouterr().err
    reader, source = Reader(tmp_path / "auto"), load_file(stored_bf16 / "model.safetensors")
    assert recipe_of(tmp_path / "auto")["compute_dtype"] == "float32"
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "bfloat16"
    assert list(reader.problems()) == []
    assert all(reader.linear(name).dense().dtype == BF16 for name in reader.sparse_names)
    for name in reader.dense_names:  # byte for byte
        assert reader.tensor(name).dtype == BF16 and torch.equal(reader.tensor(name), source[name])
    # The same bytes for the same compute dtype, whoever chose it.
    run(stored_bf16, tmp_path / "given", text, **options, compute_dtype="float32")
    assert digests(tmp_path / "auto") == digests(tmp_path / "given")
    run(stored_bf16, tmp_path / "other", text, **options, compute_dtype="bfloat16")
    assert recipe_of(tmp_path / "other")["compute_dtype"] == "bfloat16"
    assert digests(tmp_path / "auto")["model.safetensors"] != digests(tmp_path / "other")["model.safetensors"]


@pytest.mark.parametrize("options", [{"reconstruct": "block"}], ids=str)
def test_resumed_on_another_kind_of_machine_it_keeps_its_dtype(
    options, fast, stored_bf16, text, tmp_path, monkeypatch, capsys
):
    run(stored_bf16, tmp_path / "whole", text, **options, compute_dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(dtypes, "_cpu_flags", lambda: SLOW)
        with interrupted_after_a_layer():
            run(stored_bf16, tmp_path / "out", text, **options)
    with pytest.raises(RiaError, match=r"another compute-dtype \(float32\)"):
        run(stored_bf16, tmp_path / "out", text, Settings(resume=True), **options, compute_dtype="bfloat16")
    capsys.readouterr()
    run(stored_bf16, tmp_path / "out", text, Settings(resume=True), **options)
    assert "computing in float32" in capsys.readouterr().err
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")


def test_eval_computes_in_the_fast_dtype_and_says_so(slow, stored_bf16, text):
    found = {}
    for asked in ("auto", "bfloat16"):
        arguments = [str(stored_bf16), "--eval-data", str(text), "--eval-tokens", "512", "--compute-dtype", asked]
        plain, machine = (CliRunner().invoke(evaluate, [*arguments, *more]) for more in ([], ["--json"]))
        found[asked] = json.loads(machine.stdout)
        assert f"computed in {found[asked]['compute_dtype']}" in plain.stdout
    assert [entry["compute_dtype"] for entry in found.values()] == ["float32", "bfloat16"]
    assert found["auto"]["perplexity"] != found["bfloat16"]["perplexity"]
    assert found["auto"]["perplexity"] == pytest.approx(found["bfloat16"]["perplexity"], rel=0.05)
    assert load_model(str(stored_bf16), CPU).dtype == BF16

"""`ria-vllm doctor` on this machine."""

import os
import re

import torch
from click.testing import CliRunner

from ria_vllm.format.formats import FLOAT
from ria_vllm.serve.doctor import doctor, eight_line, physical_cores
from ria_vllm.serve.kernels.base import LinearLayerConfig


def run_doctor(*arguments, env=None):
    return CliRunner().invoke(doctor, arguments, env=env, catch_exceptions=False).output


def test_names_versions_and_the_chosen_kernel():
    output = run_doctor("--device", "cpu")
    assert re.search(rf"^torch\s+{re.escape(torch.__version__)}$", output, re.M)
    assert re.search(r"^vllm\s+vllm\S* \d+\.\d+.*plugin found$", output, re.M)
    linears, experts = output.split("kernels for ")[1:]
    assert len(re.findall("chosen: the first", linears)) == 1 and linears.startswith("a 4096 x 4096 BF16 linear of ")
    for lines in (linears, experts):
        assert re.search("^  cpu +chosen: .*; takes BF16, W8A16, W8A8, W4A16, W4A8$", lines, re.M)
        assert re.search("^  reference .*; takes BF16, W8A16, W8A8, W4A16, W4A8, FP8$", lines, re.M)
    lines = "cpu +chosen: the first .*\n  cutlass +no: the layer is on cpu.*\n  reference +could serve it"
    assert re.match(f"32 experts of 2048 x 768 .*:\n  {lines}", experts)


def test_what_8_of_16_would_bring(monkeypatch):
    monkeypatch.setattr("ria_vllm.serve.doctor.instruction_set", lambda: "avx2")
    dense = LinearLayerConfig(torch.device("cpu"), torch.bfloat16, FLOAT, 64, 64)
    assert "--pattern 8:16`, for CPUs only" in eight_line(dense)


def test_quantized_weights_and_rounded_inputs():
    """Which kernel takes them depends on the machine; how it does is said."""
    output = run_doctor("--device", "cpu", "--scheme", "W4A8", "--dtype", "float16")
    assert "linear of float16, int4-g32 weights, inputs rounded to int8 on cpu" in output
    assert " W4A8 linear of " in output
    output = run_doctor("--device", "cpu", "--scheme", "w8a8", env={"RIA_VLLM_BACKEND": "reference"})
    assert output.count("chosen with inputs rounded to int8: RIA_VLLM_BACKEND asks for it") == 2
    output = run_doctor("--device", "cpu", "--scheme", "FP8")
    assert "fp8 weights, inputs rounded to float8_e4m3fn where these stay fp8 on cpu, in order" in output
    linears, experts = output.split("kernels for ")[1:]
    for lines in (linears, experts):
        assert re.search("cpu +chosen with fp8 widened to bfloat16: the first that can serve this layer", lines)


def test_an_ampere_takes_w8a8(ampere_layers):
    linears, experts = run_doctor("--device", "cpu", "--scheme", "W8A8").split("kernels for ")[1:]
    assert re.search("^  cutlass +chosen with inputs rounded to int8: the first that can serve ", linears, re.M)
    said = "cutlass +chosen with inputs rounded to int8 only where vLLM has no .*, or with RIA_VLLM_BACKEND=cutlass;"
    assert re.search(f"^  {said}", experts, re.M)


def test_forced_kernel():
    assert re.search(
        r"reference\s+chosen: RIA_VLLM_BACKEND", run_doctor("--device", "cpu", env={"RIA_VLLM_BACKEND": "reference"})
    )
    assert "none: RIA_VLLM_BACKEND=nonsense" in run_doctor("--device", "cpu", env={"RIA_VLLM_BACKEND": "nonsense"})


def test_on_few_cores_it_names_the_one_that_vllm_keeps(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
    for cores, said in ((1, False), (2, True), (4, True), (5, False)):
        monkeypatch.setattr("ria_vllm.serve.doctor.physical_cores", lambda cores=cores: cores)
        line = re.search(
            r"^threads +vLLM would compute on (\d) of (\d) cores.*RESERVED_CPU=0", run_doctor("--device", "cpu"), re.M
        )
        assert (line and line.groups()) == ((str(cores - 1), str(cores)) if said else None)
    monkeypatch.setattr("ria_vllm.serve.doctor.physical_cores", lambda: 2)
    for chosen in ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}, {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}):
        assert "\nthreads" not in run_doctor("--device", "cpu", env=chosen)

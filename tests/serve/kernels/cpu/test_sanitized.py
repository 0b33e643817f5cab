"""The C++ kernels under address and undefined-behaviour sanitizers, without Python in the process."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SOURCES = ROOT / "serve" / "kernels" / "cpu" / "csrc"
DRIVER = Path(__file__).with_name("sanitized.cpp")
SANITIZE = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
EXACT = "-ffp-contract=off"
FLAGS = {
    "vec_portable_int8.cpp": [EXACT],
    "vec_avx2.cpp": AVX512[:3],
    "vec_avx2_int8.cpp": [*AVX512[:3], EXACT],
    "vec_avx_vnni.cpp": [*AVX512[:3], "-mavxvnni", EXACT],
    "vec_avx512_vnni.cpp": [*AVX512, "-mavx512vnni", EXACT],
    "vec_avx512.cpp": AVX512,
    "vec_avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi"],
    "vec_amx.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"],
    "vec_amx_int8.cpp": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8", EXACT],
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which("g++") or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("sanitized")
    sources = [path for path in SOURCES.glob("*.cpp") if not path.name.startswith("torch_")]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run(["g++", *SANITIZE, *FLAGS.get(source.name, []), "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, DRIVER]))
    subprocess.run(["g++", *SANITIZE, *objects, "-o", str(folder / "driver")], check=True)
    return folder / "driver"


@pytest.mark.slow
@pytest.mark.parametrize(
    "instruction_set", ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "portable")
)
def test_no_bad_access_and_right_products(program, instruction_set):
    # vLLM may have set LD_PRELOAD in this process; the sanitizer's runtime wants to be the first library.
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment = inherited | {"RIA_VLLM_CPU_ISA": instruction_set, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True)
    if "this machine lacks these instructions" in done.stderr:
        pytest.skip(f"this machine has no {instruction_set}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.split() == ["ok", instruction_set]

"""The C++ kernels under address and undefined-behaviour sanitizers, without Python in the process."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import kept

ROOT = Path(__file__).parents[4]
SOURCES = ROOT / "serve" / "kernels" / "cpu" / "csrc"
DRIVER = Path(__file__).with_name("sanitized.cpp")
COMMON = ["-std=c++17", f"-I{SOURCES}"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
EXACT = "-ffp-contract=off"
FLAGS = {
    "vec_portable_int8.cpp": [EXACT],
    "vec_avx2.cpp": AVX512[:3],
    "vec_avx2_int8.cpp": [*AVX512[:3], EXACT],
    "vec_avx_vnni.cpp": [*AVX512[:3], "-mavxvnni", EXACT],
    "vec_avx512_vnni.cpp": [*AVX512, "-mavx512vnni", EXACT],
    "vec_avx512_vbmi2.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi2", EXACT],
    "vec_avx512.cpp": AVX512,
    "vec_avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"],
    "vec_amx.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2", "-mamx-tile", "-mamx-bf16"],
    "vec_amx_int8.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi2", "-mamx-tile", "-mamx-int8", EXACT],
}


def macros() -> set[str]:
    """What g++ defines for this machine."""
    command = ["g++", "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())


def has_instructions(source: str) -> bool:
    """Whether this machine can run what is compiled of it."""
    defined = {line.split()[1] for line in macros()}
    needed = [flag.removeprefix("-m") for flag in FLAGS.get(source, []) if flag.startswith("-m")]
    return all(f"__{name.upper().replace('-', '_')}__" in defined for name in needed)


@pytest.fixture(scope="module")
def program() -> Path:
    """The driver, without optimisations: they take longer to compile than they save.

    Not instrumented are the driver, whose own sums would take most of the time, and what cannot run here anyway.
    """
    if not shutil.which("g++") or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86-64")
    sources = [path for path in SOURCES.glob("*.cpp") if not path.name.startswith("torch_")]
    # Of an inline function that several have, the linker takes the first copy: an instrumented one that can run here.
    sources.sort(key=lambda path: (not has_instructions(path.name), len(FLAGS.get(path.name, []))))

    def make(folder: Path) -> None:
        def compile_one(source: Path) -> str:
            target = str(folder / f"{source.stem}.o")
            if source == DRIVER:
                flags = ["-O2"]
            else:
                instrumented = SANITIZE if has_instructions(source.name) else []
                flags = ["-O0", "-g1", *instrumented, *FLAGS.get(source.name, [])]
            subprocess.run(["g++", *COMMON, *flags, "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, [*sources, DRIVER]))
        subprocess.run(["g++", *SANITIZE, *objects, "-o", str(folder / "driver")], check=True)

    read = [*(path for path in SOURCES.iterdir() if path.is_file()), DRIVER, Path(__file__)]
    return kept("sanitized", read, sorted(macros()), make) / "driver"


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
    assert all(has_instructions(f"vec_{instruction_set}{kind}.cpp") for kind in ("", "_int8"))  # so it is instrumented

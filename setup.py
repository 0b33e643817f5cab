"""Builds the CPU kernels into one library, `ria_vllm/serve/kernels/cpu/_cpu.so`. Needs only g++.

The library takes torch's stable C functions from whichever torch the process has loaded. So it is built without torch,
and one wheel fits every Python and every torch from 2.10 on. Everything else about the package is in pyproject.toml.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("ria_vllm/serve/kernels/cpu/csrc")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-ignored-attributes"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
EXACT = ["-ffp-contract=off"]  # a product is rounded before it is added, on every machine
INSTRUCTION_SETS = {
    "vec_portable.cpp": ["-O2"],  # compiles in half of the time, and its products are faster than with -O3
    "vec_portable_int8.cpp": EXACT,
    "vec_avx2.cpp": AVX2,
    "vec_avx2_int8.cpp": [*AVX2, *EXACT],
    "vec_avx_vnni.cpp": [*AVX2, "-mavxvnni", *EXACT],
    "vec_avx512.cpp": AVX512,
    # GCC 12 otherwise moves conversions of the sums into the inner loop, and half of the sums onto the stack.
    "vec_avx512_vnni.cpp": [*AVX512, "-mavx512vnni", "-fno-tree-pre", *EXACT],
    "vec_avx512_vbmi2.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi2", "-fno-tree-pre", *EXACT],
    "vec_avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"],
    "vec_amx.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2", "-mamx-tile", "-mamx-bf16"],
    "vec_amx_int8.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi2", "-mamx-tile", "-mamx-int8", "-fno-tree-pre", *EXACT],
}


def sources_and_flags() -> dict[Path, list[str]]:
    """The sources in the order in which they are linked.

    Of an inline function that several files compile, the linker keeps the first copy for all. So those with the fewest
    instructions come first: older machines would crash in another's copy.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = {path: INSTRUCTION_SETS.get(path.name, []) for path in sorted(SOURCES.glob("*.cpp"))}
    instructions = {path: sum(flag.startswith("-m") for flag in flags[path]) for path in flags}
    return {path: flags[path] for path in sorted(flags, key=instructions.__getitem__) if x86 or not instructions[path]}


class BuildCpuLibrary(build_ext):
    """Compiles each instruction set's file with its own flags, never -march=native: the choice is made at run time."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(source: Path, flags: list[str]) -> str:
            target = str(objects / f"{source.stem}.o")
            run([*compiler, *COMMON, *flags, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # Backwards: those that take longest to compile begin first.
            object_files = list(pool.map(lambda item: compile_one(*item), reversed(sources_and_flags().items())))[::-1]

        # Link to an empty library of torch's name: the dynamic loader then binds to the torch that is already loaded.
        stub, nothing = objects / "libtorch_cpu.so", objects / "nothing.cpp"
        nothing.write_text("")
        run([*compiler, "-shared", "-nostdlib", f"-Wl,-soname,{stub.name}", str(nothing), "-o", str(stub)])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        linked = objects / target.name
        link = ["-shared", *object_files, "-Wl,--no-as-needed", str(stub), "-Wl,-z,relro,-z,now", "-o", str(linked)]
        run([*compiler, *link])
        # Replace the file as a whole: a running process keeps the library that it has mapped.
        unfinished = target.with_suffix(".unfinished")
        shutil.copyfile(linked, unfinished)
        unfinished.replace(target)
        load_cuda_build().at_install(target.parents[1] / "cuda")


def run(command: list[str]) -> None:
    """Runs a compiler. Raises CompileError with the compiler's own words, which pip prints last."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")


def load_cuda_build() -> ModuleType:
    """serve/kernels/cuda/build.py, loaded by its path, because its parent packages import torch."""
    name = "ria_vllm_cuda"
    spec = spec_from_file_location(name, Path("serve/kernels/cuda/__init__.py").resolve())
    assert spec is not None
    sys.modules[name] = module_from_spec(spec)
    return import_module(f"{name}.build")


class AnyPythonWheel(bdist_wheel):
    """The library does not depend on Python: one wheel per platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("ria_vllm.serve.kernels.cpu._cpu", [str(path) for path in sources_and_flags()])],
    cmdclass={"build_ext": BuildCpuLibrary, "bdist_wheel": AnyPythonWheel},
)

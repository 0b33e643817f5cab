"""The CUDA libraries for the tests, compiled once per run. Needs nvcc and CUTLASS's headers, but no GPU.

Each comes in two forms, linked from the same object files: the one that a GPU would load, and one whose host code
drives an emulator of the GPU (emulator/), which runs the PTX that nvcc made from the kernels.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from processes import kept, once

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import CudaBuildError, Tile, find_architecture
from ria_vllm.serve.kernels.cuda.bindings import CudaLibrary, load

ALL_TILES = os.environ.get("RIA_VLLM_TEST_TILES") == "all"
EMULATOR = Path(__file__).with_name("emulator")


def chosen_tiles(arch: str) -> tuple[Tile, ...]:
    """The tiles to test: every one if RIA_VLLM_TEST_TILES=all, else all of 8.x and the small set of 9.0.

    8.x compiles in seconds; 12.x has the same sources; each tile of 10.0 would take another minute.
    """
    target = find_architecture(arch)
    if ALL_TILES or arch == "80":
        return target.tiles
    return target.small_tiles if arch == "90a" else ()


def compiled(arch: str) -> CudaLibrary:
    """The architecture's library with the tested tiles. Skips the test if it cannot be compiled."""
    target, objects = find_architecture(arch), _objects(arch)
    folder = once(f"cuda-{arch}", lambda folder: build.link(target, objects, folder))
    return load(folder / target.library)


def emulated(arch: str) -> "EmulatedLibrary":
    """The same library for tensors on the CPU, with the emulator's default settings."""
    library = _emulated(arch, _objects(arch))
    library.reset()
    return library


def emulator_alone() -> "Emulator":
    """The emulator without a library, for PTX from elsewhere. Skips the test if it cannot be compiled."""
    _find_or_skip(build.find_nvcc)
    return Emulator(ctypes.CDLL(str(link_emulator("emulator", ()))))


def _find_or_skip(find: Callable[[], object]) -> None:
    try:
        find()
    except CudaBuildError as error:
        pytest.skip(str(error))


def _objects(arch: str) -> tuple[Path, ...]:
    _find_or_skip(build.find_nvcc)
    _find_or_skip(build.find_headers)
    return _compile(arch)


def _compile(arch: str) -> tuple[Path, ...]:
    target, tiles = find_architecture(arch), chosen_tiles(arch)
    virtual = f"compute_{target.name}"
    both = replace(target, gencode=f"-gencode=arch={virtual},code=[sm_{target.name},{virtual}]")

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("NVCC_APPEND_FLAGS", "-Xfatbin=-compress=false", prepend=" ")
            build.compile_objects(both, folder, tiles)

    # The code that compiles has the flags, and headers of another version have another path.
    version = subprocess.run([build.find_nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    sources = [*build.SOURCES.iterdir(), Path(build.__file__), Path(__file__)]
    flags = version, build.find_headers(), os.environ.get("NVCC_APPEND_FLAGS"), both, tiles
    return tuple(sorted(kept(f"cuda-objects-{target.name}", sources, flags, make).iterdir()))


def emulator_objects() -> tuple[Path, ...]:
    """The emulator's object files, compiled by nvcc's host compiler, which knows where CUDA's headers are."""
    nvcc = build.find_nvcc()
    # For this machine, which may convert fp16 by an instruction; what PTX does not fuse is not fused.
    host = "-march=native,-ffp-contract=off,-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"
    flags = ["-std=c++20", "-O2", f"-Xcompiler={host}"]

    def make(folder: Path) -> None:
        def compile_one(source: Path) -> None:
            _run([nvcc, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, EMULATOR.glob("*.cpp")))

    return tuple(sorted(once("emulator-objects", make).iterdir()))


@lru_cache
def _emulated(arch: str, objects: tuple[Path, ...]) -> "EmulatedLibrary":
    return EmulatedLibrary(link_emulator(f"emulated-{arch}", objects))


def link_emulator(name: str, objects: Sequence[Path]) -> Path:
    """A shared library of the objects and the emulator.

    --no-undefined: the objects may call only the functions of CUDA's runtime that emulator/runtime.cpp defines. None of
    those waits for the device or allocates.
    """
    linked = [*map(str, objects), *map(str, emulator_objects())]
    command = [build.find_nvcc(), "-shared", "--cudart=none", "-Xlinker=--no-undefined", *linked, "-o"]
    return once(name, lambda folder: _run([*command, str(folder / "library.so")])) / "library.so"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Emulator:
    """The functions that emulator/runtime.cpp has for tests, beside CUDA's."""

    def __init__(self, library: ctypes.CDLL):
        self._c = library
        library.emulator_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint32]
        library.emulator_run.argtypes = (
            [ctypes.c_char_p] * 2 + [ctypes.c_uint32] * 3 + [ctypes.c_size_t, ctypes.c_void_p]
        )
        library.emulator_error.restype = ctypes.c_char_p

    @contextmanager
    def memory(self, read: Sequence[torch.Tensor | None], written: Sequence[torch.Tensor]):
        """A context in which kernels may read these tensors and read and write those."""
        for tensors, writable in ((read, 0), (written, 1)):
            for tensor in tensors:
                if tensor is not None:
                    self._c.emulator_allow(tensor.data_ptr(), tensor.nbytes, writable)
        try:
            yield
        finally:
            self._c.emulator_forget()

    def configure(self, seed: int, num_sms: int) -> None:
        """Sets the schedule and the number of SMs, and forgets earlier errors.

        Args:
            seed: 0 runs threads in order and asynchronous work as late as possible; any other makes both random.
        """
        self._c.emulator_configure(seed, num_sms)

    def error(self) -> str:
        """The error since the emulator was configured, or an empty string."""
        return self._c.emulator_error().decode()

    def load(self) -> tuple[int, int, int]:
        """Of the last launch: blocks that used tensor cores, most instructions of one block, instructions of all."""
        numbers = [ctypes.c_uint64() for _ in range(3)]
        self._c.emulator_load(*map(ctypes.byref, numbers))
        return tuple(number.value for number in numbers)

    def run(
        self,
        ptx: str,
        kernel: str,
        blocks: int,
        threads: int,
        arguments: Sequence[torch.Tensor],
        cluster: int = 1,
        shared: int = 0,
    ) -> None:
        """Runs a kernel whose parameters are pointers to the tensors.

        Args:
            cluster: blocks per cluster.
            shared: bytes of dynamic shared memory.

        Raises:
            RiaError: with the emulator's error.
        """
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments]
        array = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
        if self._c.emulator_run(ptx.encode(), kernel.encode(), blocks, threads, cluster, shared, array):
            raise RiaError(self.error())


class EmulatedLibrary(CudaLibrary):
    """A library for tensors on the CPU, which serve as the memory of its GPU."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.emulator = Emulator(self._c)
        self.reset()

    def reset(self) -> None:
        """Restores the default settings."""
        self.num_sms, self.seed = 8, 0

    def linear(self, tile, split_k, x, values, metadata, bias, y, workspace, scales=None):
        """As on a GPU whose memory holds only the operands."""
        with self.memory([x, values, metadata, bias, *(scales or ())], [y, workspace]):
            super().linear(tile, split_k, x, values, metadata, bias, y, workspace, scales)

    def memory(self, read: Sequence[torch.Tensor | None], written: Sequence[torch.Tensor]):
        """Emulator.memory, with this library's settings."""
        self.emulator.configure(self.seed, self.num_sms)
        return self.emulator.memory(read, written)

    def pack_metadata_on_device(self, bitmask: torch.Tensor, value_bits: int) -> torch.Tensor:
        """What pack_metadata returns for a bitmask on the GPU."""
        out_features, in_features = bitmask.shape[0], bitmask.shape[1] * 8
        metadata = torch.full((self.metadata_bytes(out_features, in_features, value_bits),), 0xFF, dtype=torch.uint8)
        arguments = value_bits, bitmask.data_ptr(), metadata.data_ptr(), out_features, in_features, 0, None
        with self.memory([bitmask], [metadata]):
            self._check(self._c.ria_pack_metadata(*arguments))
        return metadata

    def _place(self, x: torch.Tensor) -> tuple[int, int, int | None]:
        return self.num_sms, 0, None

    def _check(self, code: int, where: str = "") -> None:
        try:
            super()._check(code, where)
        except RiaError as error:
            reason = self.emulator.error()
            if not reason:
                raise
            raise RiaError(f"{error}; {reason}") from error

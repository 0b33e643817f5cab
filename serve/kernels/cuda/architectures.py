"""The GPU architectures that have CUDA kernels, and the tiles that are compiled for each.

Imports nothing but the standard library, so that setup.py can load it before torch exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_GIBIBYTE = 2**30


class CudaBuildError(Exception):
    """The CUDA kernels cannot be compiled; the message says why and what to do."""


@dataclass(frozen=True)
class Tile:
    """One instantiation of a kernel.

    Attributes:
        name: what the compiled library calls it.
        source: its file in csrc.
        macros: the macros that the file expects, without their prefix RIA_.
        value_bits: bits of a value of x and W: 16 (bf16 and fp16) or 8 (fp8 on 9.0, int8 on 8.x and 12.x).
        candidate: no rule chooses it, only a measurement (tiles.MEASURED); not compiled by default.
    """

    name: str
    source: str
    macros: dict[str, int]
    value_bits: int = 16
    candidate: bool = False


@dataclass(frozen=True)
class Architecture:
    """What one library is compiled for.

    Attributes:
        name: as in nvcc's sm_NAME.
        family: 80, 90 or 100: which kernels and metadata layout it has (csrc/metadata.h).
        gencode: nvcc's option for it.
        memory: bytes that the compiler needs for one tile, measured.
        tiles: all tiles, candidates included.
    """

    name: str
    family: int
    gencode: str
    memory: int
    tiles: tuple[Tile, ...]

    @property
    def library(self) -> str:
        """The library's file name."""
        return f"_cuda_sm{self.name}.so"

    @property
    def default_tiles(self) -> tuple[Tile, ...]:
        """All tiles but the candidates."""
        return tuple(tile for tile in self.tiles if not tile.candidate)

    @property
    def small_tiles(self) -> tuple[Tile, ...]:
        """The first tile for each width of values: enough to compute every product."""
        first = {tile.value_bits: tile for tile in reversed(self.tiles)}
        return tuple(tile for tile in self.tiles if first[tile.value_bits] is tile)


def _tile_3x(
    m: int,
    n: int,
    cluster: int = 1,
    pingpong: bool = False,
    stream_k: bool = False,
    fp8: bool = False,
    candidate: bool = False,
) -> Tile:
    name = ("fp8_" if fp8 else "") + f"{m}x{n}" + ("_cluster" if cluster > 1 else "")
    name += ("_pingpong" if pingpong else "") + ("_streamk" if stream_k else "")
    macros = {
        "TILE_M": m,
        "TILE_N": n,
        "CLUSTER_M": cluster,
        "PINGPONG": int(pingpong),
        "STREAM_K": int(stream_k),
        "FP8": int(fp8),
    }
    return Tile(name, "sparse_gemm_3x.cu", macros, 8 if fp8 else 16, candidate)


def _tile_2x(m: int, n: int, warp_m: int, warp_n: int, stages: int, int8: bool = False) -> Tile:
    macros = {"TILE_M": m, "TILE_N": n, "WARP_M": warp_m, "WARP_N": warp_n, "STAGES": stages, "INT8": int(int8)}
    return Tile(("int8_" if int8 else "") + f"{m}x{n}", "sparse_gemm_2x.cu", macros, 8 if int8 else 16)


# m counts out-features, n tokens. The first tile of each list is in `small_tiles`, which the tests compile.
_HOPPER = (
    _tile_3x(128, 16, stream_k=True),
    _tile_3x(64, 16, pingpong=True, candidate=True),
    _tile_3x(128, 64, stream_k=True),
    _tile_3x(128, 128, cluster=2, stream_k=True),
    _tile_3x(128, 128, cluster=2, pingpong=True, candidate=True),
    _tile_3x(128, 256, cluster=2),
    _tile_3x(256, 128, cluster=2, candidate=True),
)
# At most 128 tokens wide: fp8 sums take twice the registers (sparse_gemm_3x.cu), and a wider tile would not fit.
_HOPPER_FP8 = (
    _tile_3x(128, 16, stream_k=True, fp8=True),
    _tile_3x(128, 128, cluster=2, stream_k=True, fp8=True),
)
_BLACKWELL = (
    _tile_3x(128, 64, stream_k=True),
    _tile_3x(128, 128, stream_k=True),
    _tile_3x(128, 256),
)
_MMA_SYNC = (
    _tile_2x(128, 32, 32, 32, 6),
    _tile_2x(128, 64, 64, 32, 4),
    _tile_2x(128, 128, 64, 64, 3),
)
_MMA_SYNC_INT8 = (
    _tile_2x(128, 32, 32, 32, 6, int8=True),
    _tile_2x(128, 128, 64, 64, 3, int8=True),
)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("80", 80, "-gencode=arch=compute_80,code=sm_80", 1 * _GIBIBYTE, _MMA_SYNC + _MMA_SYNC_INT8),
        Architecture("90a", 90, "-gencode=arch=compute_90a,code=sm_90a", 6 * _GIBIBYTE, _HOPPER + _HOPPER_FP8),
        Architecture("100a", 100, "-gencode=arch=compute_100a,code=sm_100a", 6 * _GIBIBYTE, _BLACKWELL),
        Architecture("120", 80, "-gencode=arch=compute_120,code=sm_120", 1 * _GIBIBYTE, _MMA_SYNC + _MMA_SYNC_INT8),
    )
}
_SAME_BINARY = {"86": "80", "87": "80", "89": "80", "90": "90a", "100": "100a", "120a": "120", "121": "120"}


def find_architecture(name: str) -> Architecture:
    """The architecture by any common name: 90a, sm_90a, 9.0, 86 (Ampere and Ada share one binary).

    Raises:
        CudaBuildError: there are no kernels for it.
    """
    plain = name.strip().lower().removeprefix("sm_").removeprefix("compute_").replace(".", "")
    found = ARCHITECTURES.get(_SAME_BINARY.get(plain, plain))
    if found is None:
        raise CudaBuildError(f"no kernels for CUDA architecture {name!r}; choose from {', '.join(ARCHITECTURES)}")
    return found


def for_capability(major: int, minor: int) -> Architecture | None:
    """The architecture whose library runs on a GPU of this compute capability, or None."""
    exact = {(9, 0): "90a", (10, 0): "100a"}
    name = exact.get((major, minor)) or {8: "80", 12: "120"}.get(major)
    return ARCHITECTURES[name] if name else None


def missing_tiles(library: str, present: Sequence[str]) -> list[str]:
    """Names of the tiles that the library of this file name could have, but has not."""
    tiles = [tile.name for found in ARCHITECTURES.values() if found.library == library for tile in found.tiles]
    return [name for name in tiles if name not in present]

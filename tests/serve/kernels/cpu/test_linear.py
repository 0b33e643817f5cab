"""Every kernel that this machine can run: its results against float64, and what its operator promises."""

import ctypes
import itertools
import shutil
import subprocess
import time

import pytest
import torch
from instruction_sets import said_by
from packed_layers import pack
from sweep import BOTH, assert_close_to_float64, random_weight, sweep

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, INT4, IntFormat
from ria_vllm.serve.kernels import reference
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, instruction_set
from ria_vllm.serve.kernels.reference import ReferenceKernel

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_instruction_set_against_float64(instruction_set):
    assert said_by("sweep.py", instruction_set) == [instruction_set]


@pytest.mark.parametrize("block_rows", (reference._BLOCK_ROWS, 16))
def test_reference_against_float64(monkeypatch, block_rows):
    monkeypatch.setattr(reference, "_BLOCK_ROWS", block_rows)
    torch.manual_seed(0)
    sweep(ReferenceKernel, (1, 30), BOTH[block_rows == 16])


@pytest.mark.parametrize(("kernel", "dtype"), [(CpuKernel, torch.bfloat16), (ReferenceKernel, torch.float32)])
def test_any_leading_dimensions_and_strides(kernel, dtype):
    torch.manual_seed(1)
    weight = random_weight(37, 128, dtype=dtype)
    layer = weight.packed_by(kernel)
    permutation = torch.randperm(128, dtype=torch.int32)
    wide = torch.randn(6, 5, 256).to(dtype)
    inputs = {
        "vector": wide[0, 0, :128],
        "three dimensions": wide[..., 64:192],
        "every second token": wide[::2, 0, :128],
        "every second channel": wide[..., ::2],
        "transposed tokens": wide[..., :128].transpose(0, 1),
        "transposed channels": torch.randn(128, 9).to(dtype).T,
        "one token for all": wide[0, 0, :128].expand(7, 128),
        "no tokens": wide[:0, :, :128],
        "inner dimension of one": wide[:, :1, :128],
    }
    for name, x in inputs.items():
        y = layer(x, permutation)
        try:
            assert_close_to_float64(y, x, weight, permutation)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize(
    ("bits", "dtype"), [(0b0000, torch.bfloat16), (0b0001, torch.float32), (0b0111, torch.float16)]
)
def test_a_bitmask_that_is_not_2_of_4_is_refused_by_name(dtype, bits):
    weight = random_weight(45, 192, dtype=dtype)
    bitmask = weight.parts["bitmask"]
    bitmask[41, 7] = (bits << 4) | 0b0011
    with pytest.raises(RuntimeError, match="row 41, columns 60 to 63"):
        weight.packed_by(CpuKernel)
    bitmask[3, 0] = bits | 0b11000000
    with pytest.raises(RuntimeError, match="row 3, columns 0 to 3"):
        weight.packed_by(CpuKernel)


def test_wrong_arguments_are_refused():
    weight = random_weight(32, 128)
    (packed,) = weight.packed_by(CpuKernel).packed
    compressed, bitmask = weight.parts["compressed"], weight.parts["bitmask"]
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    call = torch.ops.ria.sparse24_linear.cpu
    wrong = [
        (x.half(), packed, 32, None, None),
        (x, packed, 33, None, None),
        (x, packed[:-1], 32, None, None),
        (x, torch.zeros_like(packed), 32, None, None),
        (x, packed, 32, torch.arange(128), None),
        (x, packed, 32, torch.arange(1, 129, dtype=torch.int32), None),
        (x, packed, 32, torch.arange(-1, 127, dtype=torch.int32), None),
        (x, packed, 32, None, torch.zeros(31, dtype=torch.bfloat16)),
        (x, packed, 32, None, torch.zeros(32)),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="ria::sparse24"):
            call(*arguments)
    scales, int8 = torch.ones(32), compressed.to(torch.int8)
    grouped, int4 = torch.ones(32, 4), int8[:, ::2].contiguous().view(torch.uint8)
    for refused in (
        (compressed[:, :32], bitmask, None, 0),
        (compressed, bitmask[:16], None, 0),
        (compressed.double(), bitmask, None, 0),
        (compressed, bitmask, scales, 0),
        (compressed, bitmask, None, 32),
        (int8, bitmask, None, 0),
        (int8, bitmask, scales[:31], 0),
        (int8, bitmask, scales.double(), 0),
        (int8, bitmask, scales[:, None], 0),
        (int8, bitmask, grouped, 64),
        (int8, bitmask, grouped.T.contiguous().T, 32),
        (int8, bitmask, torch.ones(32, 8), 16),
        (int8, bitmask, grouped, -32),
        (int4, bitmask, None, 0),
        (int4, bitmask[:, :8].contiguous(), scales, 0),
        (int4.view(torch.bool), bitmask, scales, 0),
    ):
        with pytest.raises(RuntimeError, match="ria::sparse24"):
            torch.ops.ria.sparse24_pack.cpu(*refused)
    for good in ((int8, bitmask, scales, 0), (int4, bitmask, scales, 0), (int4, bitmask, grouped, 32)):
        packed = torch.ops.ria.sparse24_pack.cpu(*good)
        for dtype in sparse24.VALUE_DTYPES:
            assert call(torch.zeros(1, 128, dtype=dtype), packed, 32, None, None).dtype == dtype
            with pytest.raises(RuntimeError, match="bias must be"):
                call(torch.zeros(1, 128, dtype=dtype), packed, 32, None, torch.zeros(32, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="bfloat16, float16 or float32 for int8"):
            call(torch.zeros(1, 128, dtype=torch.float64), packed, 32, None, None)


@pytest.mark.parametrize(
    "changes",
    # The last one has the right size: a group of 32 columns, and scales in a dtype of -1.
    [{0: 1}, {4: 128}, {6: 1}, {8: 32}, {8: 32, 7: -3}, {10: 4}, {9: 1, 10: 1}],
    ids=str,
)
def test_a_damaged_header_is_refused(changes):
    """What is added to int32s: 0 magic, 4 columns, 6 dtype, 7 of scales, 8 group size, 9 activations, 10 pattern."""
    (packed,) = random_weight(32, 128, INT4).packed_by(CpuKernel).packed
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    torch.ops.ria.sparse24_linear.cpu(x, packed, 32, None, None)
    for place, change in changes.items():
        packed[:64].view(torch.int32)[place] += change
    with pytest.raises(RuntimeError, match="does not fit|truncated"):
        torch.ops.ria.sparse24_linear.cpu(x, packed, 32, None, None)


@pytest.mark.parametrize("kernel", (CpuKernel, ReferenceKernel), ids=lambda kernel: kernel.name)
def test_operator_passes_opcheck(kernel):
    packed = random_weight(24, 64).packed_by(kernel).packed
    weight = (packed[0], 24) if kernel is CpuKernel else (list(packed), "float", False, 24)
    operator = getattr(torch.ops.ria.sparse24_linear, kernel.name)
    permutation = torch.randperm(64, dtype=torch.int32)
    for x in (torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(2, 3, 128, dtype=torch.bfloat16)[..., ::2]):
        torch.library.opcheck(operator, (x, *weight, permutation, torch.randn(24, dtype=torch.bfloat16)))
        torch.library.opcheck(operator, (x, *weight, None, None))


@pytest.mark.parametrize("kernel", (CpuKernel, ReferenceKernel), ids=lambda kernel: kernel.name)
def test_compiles_whole_with_dynamic_tokens(kernel):
    torch.manual_seed(4)
    packed = random_weight(48, 64).packed_by(kernel)
    permutation, bias = torch.randperm(64, dtype=torch.int32), torch.randn(48, dtype=torch.bfloat16)

    def layer(x):
        return packed(x * 2, permutation, bias) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5, 40):
        x = torch.randn(tokens, 64, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x))


TILE_CONFIGURATION = """
void load_tiles(const void* p) { __asm__ volatile("ldtilecfg (%0)" : : "r"(p) : "memory"); }
void store_tiles(void* p) { __asm__ volatile("sttilecfg (%0)" : : "r"(p) : "memory"); }
"""


def test_tile_configuration_is_restored(tmp_path):
    """Another library's configuration of AMX's tile registers, and its results, are the same after our product."""
    if instruction_set() != "amx":
        pytest.skip(f"this process uses {instruction_set()}, not amx")
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    (tmp_path / "tiles.c").write_text(TILE_CONFIGURATION)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "tiles.so", tmp_path / "tiles.c"], check=True)
    tiles = ctypes.CDLL(str(tmp_path / "tiles.so"))
    theirs = bytearray(64)  # palette 1: two tiles of 5 and 9 rows of 48 and 32 bytes
    theirs[0], theirs[16], theirs[18], theirs[48], theirs[49] = 1, 48, 32, 5, 9
    torch.manual_seed(8)
    weight, rounded = random_weight(80, 256), random_weight(80, 256, IntFormat(4, 32))
    # With int8 inputs and groups of 32 columns, the tiles have other shapes.
    layers = [weight.packed_by(CpuKernel), pack(CpuKernel, rounded.parts, rounded.format, torch.bfloat16, torch.int8)]
    dense, x = torch.randn(96, 160).bfloat16(), torch.randn(40, 160).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        before = torch.nn.functional.linear(x, dense)
        for configuration in (theirs, bytearray(64)):  # all zeros: none
            for layer, tokens in itertools.product(layers, (7, 100)):
                loaded = ctypes.create_string_buffer(bytes(configuration), 64)
                tiles.load_tiles(loaded)
                layer(weight.x(tokens))
                after = ctypes.create_string_buffer(64)
                tiles.store_tiles(after)
                assert after.raw == bytes(configuration)
                assert torch.equal(torch.nn.functional.linear(x, dense), before)
    finally:
        tiles.load_tiles(ctypes.create_string_buffer(64))
        torch.set_num_threads(threads)


def test_tokens_that_are_nan_take_hardly_longer():
    """In a server's first run all may be NaN."""
    weight = random_weight(1536, 576, FLOAT, torch.bfloat16)
    layer, x = weight.packed_by(), weight.x(256)

    def seconds(x: torch.Tensor) -> float:
        begun = time.thread_time()
        layer(x)
        return time.thread_time() - begun

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clean, nan = (min(seconds(one) for _ in range(5)) for one in (x, torch.full_like(x, float("nan"))))
    finally:
        torch.set_num_threads(threads)
    assert nan < 30 * clean  # once 1200 times

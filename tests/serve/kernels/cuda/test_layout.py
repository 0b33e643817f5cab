"""The metadata's layout, from the kernels' own definitions, against independent readings of the PTX manual."""

from itertools import product

import pytest
import torch
from cuda_libraries import compiled
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from ria_vllm.format import sparse24

SHAPES = [(8, 64), (136, 320), (200, 192)]
LEGAL_GROUPS = {0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110}

pytestmark = pytest.mark.slow


def random_pair(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out_features * in_features)
    dense = torch.randn(out_features, in_features, generator=generator).to(torch.bfloat16)
    return sparse24.compress(dense)


def warpgroup_place(out_features: int, row: int, group: int, atom_rows: int) -> tuple[int, int]:
    """(byte, nibble within the byte) of one group's four bits, for wgmma and tcgen05.

    PTX: a warp's instruction covers 16 rows and 32 columns. A 32-bit register holds eight groups: 16 columns of row r
    (low half) and of row r + 8 (high half). Of two neighbouring lanes, one holds columns 0 to 15, the other 16 to 31.
    The registers of four instructions, which cover 128 columns, lie side by side. From there, lanes are ordered by row,
    then by half of the columns, then by 16 rows; blocks of `atom_rows` x 128 go down the rows first.
    """
    column = 4 * group
    atoms_down = -(-out_features // atom_rows)
    atom = column // 128 * atoms_down + row // atom_rows
    row %= atom_rows
    instruction, half, within = column % 128 // 32, column % 32 // 16, column % 16 // 4
    register = ((row // 16 * 2 + half) * 8 + row % 8) * 4 + instruction
    nibble = register * 8 + row % 16 // 8 * 4 + within
    return atom * atom_rows * 16 + nibble // 2, nibble % 2


@pytest.mark.parametrize("arch, atom_rows", [("90a", 64), ("100a", 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_the_registers_of_a_warpgroup_gives_the_matrix_back(arch, atom_rows, shape):
    compressed, bitmask = random_pair(*shape)
    metadata = compiled(arch).pack_metadata(bitmask)
    dense = torch.zeros(shape, dtype=compressed.dtype)
    for row in range(shape[0]):
        for group in range(shape[1] // 4):
            byte, high = warpgroup_place(shape[0], row, group, atom_rows)
            indices = int(metadata[byte]) >> 4 * high & 15
            for kept in (0, 1):
                dense[row, 4 * group + (indices >> 2 * kept & 3)] = compressed[row, 2 * group + kept]
    assert torch.equal(dense, sparse24.decompress(compressed, bitmask))


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_the_registers_of_a_warpgroup_gives_the_matrix_back_in_fp8(shape):
    """The layout for 8-bit values.

    PTX, wgmma.mma_async.sp of m64nNk64: a warp's instruction covers 16 rows and 64 columns, and a lane's 32-bit
    register holds the eight groups of 32 columns of one row. Four lanes belong to row r of the first eight: the first
    holds row r, columns 0 to 31; the second row r + 8, columns 0 to 31; the third and fourth columns 32 to 63 of these
    rows. In memory the registers of a row's 128 columns lie side by side, then come those of the next row. Blocks of
    64 x 128 go down the rows first, and columns are padded to 256, the K of a tile.
    """
    compressed, bitmask = random_pair(*shape)
    registers = compiled("90a").pack_metadata(bitmask, value_bits=8).view(torch.int32)
    dense = torch.zeros(shape, dtype=compressed.dtype)
    blocks_down, read = -(-shape[0] // 64), set()
    for block_row, block_column in product(range(blocks_down), range(-(-shape[1] // 256) * 2)):
        for instruction, warp, lane in product(range(2), range(4), range(32)):
            row_in_block = 16 * warp + lane // 4 + 8 * (lane % 2)
            half = lane % 4 // 2
            place = ((block_column * blocks_down + block_row) * 64 + row_in_block) * 4 + 2 * instruction + half
            read.add(place)
            row, first = 64 * block_row + row_in_block, 128 * block_column + 64 * instruction + 32 * half
            for within in range(8):
                indices, column = int(registers[place]) >> 4 * within & 15, first + 4 * within
                assert indices in LEGAL_GROUPS  # also in the padding
                if row < shape[0] and column < shape[1]:
                    for kept in (0, 1):
                        dense[row, column + (indices >> 2 * kept & 3)] = compressed[row, column // 2 + kept]
    assert len(read) == len(registers)
    assert torch.equal(dense, sparse24.decompress(compressed, bitmask))


@pytest.mark.parametrize("shape, int8", [((32, 64), False), ((224, 192), False), ((32, 128), True), ((224, 384), True)])
def test_mma_sync_metadata_is_what_torch_gives_its_own_cutlass_kernel(shape, int8):
    compressed, bitmask = random_pair(*shape)
    if int8:
        compressed = torch.randint(1, 128, compressed.shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    values, expected = sparse_semi_structured_from_dense_cutlass(sparse24.decompress(compressed, bitmask))
    assert torch.equal(values, compressed) and expected.itemsize == (4 if int8 else 2)
    metadata = compiled("80").pack_metadata(bitmask, 8 if int8 else 16)
    assert torch.equal(metadata.view(expected.dtype), expected.reshape(-1))


LAYOUTS = [("80", 16), ("80", 8), ("90a", 16), ("90a", 8), ("100a", 16)]


@pytest.mark.parametrize("arch, value_bits", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_offsets_are_distinct_and_inside(arch, value_bits, shape):
    library = compiled(arch)
    out_features, in_features = shape
    offsets = [
        library.metadata_offset(out_features, in_features, row, byte, value_bits)
        for row in range(out_features)
        for byte in range(in_features // 8)
    ]
    assert len(set(offsets)) == len(offsets)
    assert min(offsets) >= 0 and max(offsets) < library.metadata_bytes(out_features, in_features, value_bits)


@pytest.mark.parametrize("arch, value_bits", LAYOUTS)
def test_no_bitmask_makes_metadata_that_the_hardware_forbids(arch, value_bits):
    bitmask = torch.arange(256, dtype=torch.uint8).repeat(9, 1)
    metadata = compiled(arch).pack_metadata(bitmask, value_bits)
    assert {int(byte) & 15 for byte in metadata} | {int(byte) >> 4 for byte in metadata} == LEGAL_GROUPS

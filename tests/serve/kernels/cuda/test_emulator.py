"""The emulator itself: what is between threads is what PTX says, and what would go wrong on a GPU is reported.

That it calculates, the products of test_emulated_kernels.py show, which are those of float64.
"""

import random
import struct

import pytest
import torch
from cuda_libraries import emulator_alone

from ria_vllm.errors import RiaError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def emulator():
    """The emulator alone, for the kernels of this file."""
    return emulator_alone()


def kernel(body: str, target: str = "sm_90a", directive: str = "", outside: str = "") -> str:
    """A kernel around `body`. %in and %out are its two arguments; %a and %b point at each thread's eight bytes of them;
    %s is the address of a KiB of shared memory; %t is the thread's index."""
    return f"""
.version 9.0
.target {target}
.address_size 64
{outside}
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
{directive}
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<16>; .reg .f32 %f<8>;
    .reg .b64 %in, %out, %a, %b; .reg .b32 %t, %s;
    .shared .align 128 .b8 area[1024];
    ld.param.u64 %in, [k_param_0];
    ld.param.u64 %out, [k_param_1];
    mov.u32 %t, %tid.x;
    mov.u32 %s, area;
    mul.wide.u32 %d15, %t, 8;
    add.s64 %a, %in, %d15;
    add.s64 %b, %out, %d15;
    {body}
    ret;
}}
"""


def run(emulator, body, values=(0,), threads=None, seed=0, blocks=1, cluster=1, dynamic=0, results=None, **text):
    """Runs the kernel and returns the unsigned 64-bit numbers that it writes: one per thread, or `results` in all."""
    threads = threads or len(values)
    source = torch.tensor([signed(value, 64) for value in values])
    result = torch.full((results or threads,), -1, dtype=torch.int64)
    emulator.configure(seed, 4)
    with emulator.memory([source], [result]):
        emulator.run(kernel(body, **text), "k", blocks, threads, [source, result], cluster, dynamic)
    return [value & 2**64 - 1 for value in result.tolist()]


M32, M64 = 2**32 - 1, 2**64 - 1


def signed(value, bits):
    """The lowest bits as a two's complement number."""
    value &= 2**bits - 1
    return value - 2**bits if value >> bits - 1 else value


def bits_of(value: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def float_of(bits: int) -> float:
    """The float32 of the lowest 32 bits."""
    return struct.unpack("<f", struct.pack("<I", bits & M32))[0]


def sparse_fragments(values, kept, b, c):
    """16 registers per lane for mma.sp.m16n8k32 of bf16, from the PTX manual's description of its fragments.

    Four for the kept values, four for B, four for C, one for metadata, three unused.
    """

    def bf16s(low, high):
        return bits_of(low) >> 16 | bits_of(high) >> 16 << 16

    def metadata(row, half):
        groups = kept[row][4 * half : 4 * half + 4]
        return sum((first | second << 2) << 4 * k for k, (first, second) in enumerate(groups))

    registers = []
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for row, column in ((group, 0), (group + 8, 0), (group, 8), (group + 8, 8)):
            registers.append(bf16s(*values[row][column + 2 * thread : column + 2 * thread + 2]))
        registers += [bf16s(b[row][group], b[row + 1][group]) for row in range(2 * thread, 32, 8)]
        registers += [bits_of(c[row][2 * thread + k]) for row in (group, group + 8) for k in (0, 1)]
        # The first two threads of each four have 16 columns each.
        both = metadata(group, thread) | metadata(group + 8, thread) << 16 if thread < 2 else M32
        registers += [both, 0, 0, 0]
    return registers


def multiplied(emulator, product, registers):
    """What `product` makes of 16 registers per lane; two 64-bit numbers of each lane."""
    memory = [low | high << 32 for low, high in zip(registers[::2], registers[1::2], strict=True)]
    fours = ["{" + ", ".join(f"%r{4 * k + i}" for i in range(4)) + "}" for k in range(4)]
    load = " ".join(f"ld.global.v4.b32 {four}, [%d0+{16 * k}];" for k, four in enumerate(fours))
    body = f"""
    mul.wide.u32 %d1, %t, 64; add.s64 %d0, %in, %d1; {load}
    {product} {fours[2]}, {fours[0]}, {fours[1]}, {fours[2]}, %r12, 0x0;
    mul.wide.u32 %d1, %t, 16; add.s64 %d0, %out, %d1; st.global.v4.b32 [%d0], {fours[2]};
    """
    return run(emulator, body, memory, threads=32, results=64)


def exact_results(values, kept, b, c):
    """(number of a result, its first bit there, c + A b) of all lanes, for the matrix A with these values in kept
    places."""
    for lane in range(32):
        for k in range(4):
            row, column = lane // 4 + k // 2 * 8, lane % 4 * 2 + k % 2
            places = [4 * group + place for group, two in enumerate(kept[row]) for place in two]
            exact = c[row][column] + sum(values[row][i] * b[place][column] for i, place in enumerate(places))
            yield 2 * lane + k // 2, k % 2 * 32, exact


def test_a_sparse_product_is_that_of_its_matrices(emulator):
    generator = random.Random(3)
    kept = [[sorted(generator.sample(range(4), 2)) for group in range(8)] for row in range(16)]
    values, b, c = (
        [[generator.randrange(-8, 9) for column in range(columns)] for row in range(rows)]
        for rows, columns in ((16, 16), (32, 8), (16, 8))
    )
    product = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32"
    results = multiplied(emulator, product, sparse_fragments(values, kept, b, c))
    for number, shift, exact in exact_results(values, kept, b, c):
        assert float_of(results[number] >> shift) == exact


def int8_fragments(values, kept, b, c):
    """16 registers per lane for mma.sp.m16n8k64 of s8, likewise."""

    def bytes_of(four):
        return sum((value & 255) << 8 * k for k, value in enumerate(four))

    registers = []
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for row, column in ((group, 0), (group + 8, 0), (group, 16), (group + 8, 16)):
            registers.append(bytes_of(values[row][column + 4 * thread : column + 4 * thread + 4]))
        registers += [bytes_of(b[row + k][group] for k in range(4)) for row in range(4 * thread, 64, 16)]
        registers += [c[row][2 * thread + k] & M32 for row in (group, group + 8) for k in (0, 1)]
        # Of each four lanes, two have columns 0 to 31, of rows `group` and 8 below, and two columns 32 to 63.
        groups = kept[group + thread % 2 * 8][thread // 2 * 8 :][:8]
        registers += [sum((first | second << 2) << 4 * k for k, (first, second) in enumerate(groups)), 0, 0, 0]
    return registers


def test_a_sparse_product_of_integers_is_that_of_its_matrices_and_saturates(emulator):
    generator = random.Random(4)
    kept = [[sorted(generator.sample(range(4), 2)) for group in range(16)] for row in range(16)]
    values, b = (
        [[generator.randrange(-128, 128) for column in range(columns)] for row in range(rows)]
        for rows, columns in ((16, 32), (64, 8))
    )
    c = [[generator.choice([0, 5, 2**31 - 1, 1 - 2**31]) for column in range(8)] for row in range(16)]
    product = "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32.satfinite"
    results = multiplied(emulator, product, int8_fragments(values, kept, b, c))
    for number, shift, exact in exact_results(values, kept, b, c):
        assert signed(results[number] >> shift, 32) == max(1 - 2**31, min(2**31 - 1, exact))


COPY = "shl.b32 %r0, %t, 3; add.s32 %r1, %s, %r0; cp.async.ca.shared.global [%r1], [%a], 8; cp.async.commit_group;"
READ = "ld.shared.u64 %d0, [%r1]; st.global.u64 [%b], %d0; cp.async.wait_all;"


def test_a_copy_is_visible_after_its_wait_and_not_before(emulator):
    values = list(range(100, 132))
    assert run(emulator, f"{COPY} cp.async.wait_group 0; {READ}", values) == values
    assert run(emulator, f"{COPY} cp.async.wait_group 1; {READ}", values) == [M64] * 32


def test_a_missing_barrier_shows_in_every_order(emulator):
    """Each thread reads what a thread of the other warp wrote."""
    write = "shl.b32 %r0, %t, 3; add.s32 %r1, %s, %r0; cvt.u64.u32 %d0, %t; st.shared.u64 [%r1], %d0;"
    read = "xor.b32 %r2, %t, 32; shl.b32 %r2, %r2, 3; add.s32 %r2, %s, %r2; ld.shared.u64 %d1, [%r2];"
    read += "st.global.u64 [%b], %d1;"
    right = [thread ^ 32 for thread in range(64)]
    for seed in range(6):
        assert run(emulator, f"{write} bar.sync 0; {read}", threads=64, seed=seed) == right
        assert run(emulator, f"{write} {read}", threads=64, seed=seed) != right


@pytest.mark.parametrize(
    "body, reason",
    [
        ("st.global.u64 [%b+8], %d15;", "writes outside of global memory"),
        ("ld.global.u64 %d0, [%a+-8];", "reads outside of global memory"),
        ("st.global.u64 [%a], %d15;", "writes to read-only memory"),
        ("ld.global.v2.u32 {%r0, %r1}, [%a+4];", "a misaligned address"),
        ("st.shared.u32 [%s+1024], %r0;", "outside of shared memory"),
        ("mbarrier.arrive.shared::cta.b64 _, [%s];", "an mbarrier that was not initialised"),
        ("bar.sync 0, 64;", "no thread can proceed"),
        ("cp.async.ca.shared.global [%s], [%a], 8;", "exits without waiting for its copies"),
        ("bar.warp.sync -1; shfl.sync.down.b32 %r0, %t, 1, 31, -1;", "a shuffle from a lane that does not take part"),
    ],
)
def test_what_would_go_wrong_on_a_gpu_is_an_error_that_names_the_instruction(emulator, body, reason):
    with pytest.raises(RiaError, match=reason) as raised:
        run(emulator, f"setp.eq.s32 %p0, %t, -1; {body}")
    assert "PTX line" in str(raised.value) or "at line" in str(raised.value)

"""The emulator itself: that it computes what PTX says, and that it sees what a GPU would not forgive."""

import random
import struct

import pytest
import torch
from compiled_cuda import Emulator, link_emulator

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels import cuda_compile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def emulator():
    import ctypes

    try:
        cuda_compile.find_nvcc()
    except cuda_compile.CudaBuildError as error:
        pytest.skip(str(error))
    return Emulator(ctypes.CDLL(str(link_emulator("emulator", ()))))


def kernel(body: str, shared: int = 1024) -> str:
    """Two pointers, %in and %out; each thread's own eight bytes of both at %a and %b."""
    return f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<16>; .reg .f32 %f<8>;
    .reg .b64 %in, %out, %a, %b; .reg .b32 %t, %s;
    .shared .align 128 .b8 area[{shared}];
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


def run(emulator, body, values=(0,), threads=None, seed=0, written=True, shared=1024):
    """The eight bytes that each thread leaves, as unsigned numbers."""
    source = torch.tensor([struct.unpack("<q", struct.pack("<Q", v))[0] for v in values])
    result = torch.full((threads or len(values),), -1, dtype=torch.int64)
    emulator.configure(seed, 4)
    with emulator.memory([source] if written else [source, result], [result] if written else []):
        emulator.run(kernel(body, shared), "k", 1, threads or len(values), [source, result])
    return [value & 2**64 - 1 for value in result.tolist()]


M32, M64 = 2**32 - 1, 2**64 - 1


def signed(value, bits):
    value &= 2**bits - 1
    return value - 2**bits if value >> bits - 1 else value


def prmt(a, b, selector):
    data = struct.pack("<II", a, b)
    picked = [(data[s & 7], s >> 3) for s in (selector >> 4 * i & 15 for i in range(4))]
    return int.from_bytes(bytes((0xFF if byte & 0x80 else 0) if sign else byte for byte, sign in picked), "little")


# Of 64 bits v: a is the lower half, b the upper.
OPERATIONS = {
    "add.s32 %r2, %r0, %r1": lambda a, b: a + b & M32,
    "sub.s32 %r2, %r0, %r1": lambda a, b: a - b & M32,
    "mul.lo.s32 %r2, %r0, %r1": lambda a, b: a * b & M32,
    "mul.hi.u32 %r2, %r0, %r1": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r2, %r0, %r1": lambda a, b: signed(a, 32) * signed(b, 32) >> 32 & M32,
    "mad.lo.s32 %r2, %r0, %r1, %r0": lambda a, b: a * b + a & M32,
    "min.s32 %r2, %r0, %r1": lambda a, b: min(signed(a, 32), signed(b, 32)) & M32,
    "max.u32 %r2, %r0, %r1": lambda a, b: max(a, b),
    "shr.s32 %r2, %r0, 5": lambda a, b: signed(a, 32) >> 5 & M32,
    "shr.u32 %r2, %r0, 5": lambda a, b: a >> 5,
    "shl.b32 %r2, %r0, %r1": lambda a, b: a << b & M32 if b < 32 else 0,
    "lop3.b32 %r2, %r0, %r1, 12345, 0x6a": lambda a, b: ((a & b) ^ 12345) & M32,
    "prmt.b32 %r2, %r0, %r1, 0x9c15": lambda a, b: prmt(a, b, 0x9C15),
    "bfe.u32 %r2, %r0, 7, 9": lambda a, b: a >> 7 & 511,
    "bfe.s32 %r2, %r0, 7, 9": lambda a, b: signed(a >> 7, 9) & M32,
    "bfi.b32 %r2, %r0, %r1, 4, 12": lambda a, b: b & ~(0xFFF << 4) | (a & 0xFFF) << 4,
    "shf.l.wrap.b32 %r2, %r0, %r1, 8": lambda a, b: (b << 32 | a) << 8 >> 32 & M32,
    "shf.r.clamp.b32 %r2, %r0, %r1, 40": lambda a, b: b,
    "popc.b32 %r2, %r0": lambda a, b: a.bit_count(),
    "clz.b32 %r2, %r0": lambda a, b: 32 - a.bit_length(),
    "neg.s32 %r2, %r0": lambda a, b: -a & M32,
    "not.b32 %r2, %r0": lambda a, b: ~a & M32,
    "setp.lt.s32 %p0, %r0, %r1; selp.b32 %r2, 1, 2, %p0": lambda a, b: 1 if signed(a, 32) < signed(b, 32) else 2,
    "setp.lt.u32 %p0, %r0, %r1; setp.gt.or.s32 %p1|%p2, %r0, 0, %p0; selp.b32 %r2, 1, 2, %p2": lambda a, b: (
        1 if signed(a, 32) <= 0 or a < b else 2
    ),
    "cvt.u16.u32 %h0, %r0; cvt.s32.s16 %r2, %h0": lambda a, b: signed(a, 16) & M32,
    "mov.b32 {%h0, %h1}, %r0; mov.b32 %r2, {%h1, %h0}": lambda a, b: a >> 16 | (a & 0xFFFF) << 16,
}
OPERATIONS_64 = {
    "mul.wide.s32 %d2, %r0, %r1": lambda v, a, b: signed(a, 32) * signed(b, 32) & M64,
    "mad.wide.u32 %d2, %r0, %r1, %d0": lambda v, a, b: a * b + v & M64,
    "mul.hi.u64 %d2, %d0, %d0": lambda v, a, b: v * v >> 64,
    "shr.s64 %d2, %d0, 9": lambda v, a, b: signed(v, 64) >> 9 & M64,
    "rem.u64 %d2, %d0, 1000003": lambda v, a, b: v % 1000003,
    "cvt.s64.s32 %d2, %r0": lambda v, a, b: signed(a, 32) & M64,
    "mov.b64 %d2, {%r1, %r0}": lambda v, a, b: a << 32 | b,
}


def numbers():
    generator = random.Random(0)
    edges = [0, 1, M32, M64, 1 << 31, 1 << 63, (5 << 32) + 3, (3 << 32) + 5]
    return edges + [generator.getrandbits(64) for _ in range(56)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_integer_instructions(emulator, operation):
    values = numbers()
    load = "ld.global.v2.u32 {%r0, %r1}, [%a];"
    results = run(emulator, f"{load} {operation}; cvt.u64.u32 %d1, %r2; st.global.u64 [%b], %d1;", values)
    assert results == [OPERATIONS[operation](value & M32, value >> 32) for value in values]


@pytest.mark.parametrize("operation", OPERATIONS_64)
def test_wide_integer_instructions(emulator, operation):
    values = numbers()
    load = "ld.global.u64 %d0, [%a]; mov.b64 {%r0, %r1}, %d0;"
    results = run(emulator, f"{load} {operation}; st.global.u64 [%b], %d2;", values)
    assert results == [OPERATIONS_64[operation](value, value & M32, value >> 32) for value in values]


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_floats_are_rounded_as_torch_does(emulator, name, dtype):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-8, 8).repeat(4)
    values = [int(bits) & M32 for bits in x.view(torch.int32)]
    convert = f"ld.global.f32 %f0, [%a]; cvt.rn.{name}x2.f32 %r0, %f0, 0f3F800000;"
    results = run(emulator, f"{convert} cvt.u64.u32 %d0, %r0; st.global.u64 [%b], %d0;", values)
    assert [r & 0xFFFF for r in results] == [int(torch.ones(1, dtype=dtype).view(torch.int16))] * 64
    assert [r >> 16 for r in results] == [int(bits) & 0xFFFF for bits in x.to(dtype).view(torch.int16)]


def test_shuffles_votes_and_elections(emulator):
    body = """
    shfl.sync.bfly.b32 %r0|%p0, %t, 3, 31, -1;
    shfl.sync.up.b32 %r1|%p1, %t, 2, 0, -1;
    shfl.sync.idx.b32 %r2, %t, 5, 0x1807, -1;
    elect.sync %r3|%p2, -1;
    setp.gt.u32 %p3, %t, 20;
    vote.sync.ballot.b32 %r4, %p3, -1;
    selp.b32 %r5, 1, 0, %p2;
    shl.b32 %r1, %r1, 8; shl.b32 %r2, %r2, 16; shl.b32 %r5, %r5, 24;
    add.s32 %r0, %r0, %r1; add.s32 %r0, %r0, %r2; add.s32 %r0, %r0, %r5;
    mov.b64 %d0, {%r0, %r4};
    st.global.u64 [%b], %d0;
    """
    results = run(emulator, body, threads=32)
    for lane, result in enumerate(results):
        assert result >> 32 == M32 - (1 << 21) + 1
        assert result & 255 == lane ^ 3
        assert result >> 8 & 255 == (lane - 2 if lane >= 2 else lane)
        assert result >> 16 & 255 == lane // 8 * 8 + 5
        assert result >> 24 & 255 == (lane == 0)


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_go_to_registers_and_back(emulator, transposed):
    """stmatrix undoes ldmatrix, and a lane holds elements 2 * (lane % 4) and the next of row lane / 4."""
    rows = "shl.b32 %r9, %t, 4; add.s32 %r10, %s, %r9;"
    fill = "shl.b32 %r8, %t, 3; add.s32 %r11, %s, %r8; ld.global.u64 %d0, [%a]; st.shared.u64 [%r11], %d0; bar.sync 0;"
    load = f"ldmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 {{%r0, %r1}}, [%r10];"
    values = [sum((4 * lane + i) << 16 * i for i in range(4)) for lane in range(32)]
    first = run(emulator, f"{rows} {fill} {load} mov.b64 %d1, {{%r0, %r1}}; st.global.u64 [%b], %d1;", values)
    matrix = torch.arange(128).view(2, 8, 8)
    if transposed:
        matrix = matrix.transpose(1, 2)
    for lane, result in enumerate(first):
        for which in (0, 1):
            pair = matrix[which, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert result >> 32 * which & M32 == int(pair[0]) | int(pair[1]) << 16
    store = f"stmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 [%r10], {{%r0, %r1}};"
    again = f"{rows} {fill} {load} bar.sync 0; {store} bar.sync 0; ld.shared.u64 %d1, [%r11]; st.global.u64 [%b], %d1;"
    assert run(emulator, again, values) == values


COPY = "shl.b32 %r0, %t, 3; add.s32 %r1, %s, %r0; cp.async.ca.shared.global [%r1], [%a], 8; cp.async.commit_group;"
READ = "ld.shared.u64 %d0, [%r1]; st.global.u64 [%b], %d0; cp.async.wait_all;"


def test_a_copy_is_there_after_its_wait_and_not_before(emulator):
    values = list(range(100, 132))
    assert run(emulator, f"{COPY} cp.async.wait_group 0; {READ}", values) == values
    assert run(emulator, f"{COPY} cp.async.wait_group 1; {READ}", values) == [M64] * 32


def test_a_barrier_that_is_missing_shows_in_some_order(emulator):
    """Each thread reads what the next warp's wrote."""
    write = "shl.b32 %r0, %t, 3; add.s32 %r1, %s, %r0; cvt.u64.u32 %d0, %t; st.shared.u64 [%r1], %d0;"
    read = "xor.b32 %r2, %t, 32; shl.b32 %r2, %r2, 3; add.s32 %r2, %s, %r2; ld.shared.u64 %d1, [%r2];"
    read += "st.global.u64 [%b], %d1;"
    right = [thread ^ 32 for thread in range(64)]
    for seed in range(6):
        assert run(emulator, f"{write} bar.sync 0; {read}", threads=64, seed=seed) == right
        assert run(emulator, f"{write} {read}", threads=64, seed=seed) != right


WAIT = "LOOP: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%s], 0; @!%p1 bra LOOP;"


def test_an_mbarrier_lets_go_when_all_have_arrived(emulator):
    body = f"""
    setp.ne.s32 %p0, %t, 0;
    @%p0 bra READY;
    mbarrier.init.shared::cta.b64 [%s], 64;
    READY: bar.sync 0;
    mbarrier.arrive.shared::cta.b64 _, [%s];
    {WAIT}
    mov.u64 %d0, 7;
    st.global.u64 [%b], %d0;
    """
    assert run(emulator, body, threads=64, seed=3) == [7] * 64
    with pytest.raises(RiaError, match="(?s)no thread can go on:.*warp 1: .*bra LOOP"):
        run(emulator, body.replace("[%s], 64;", "[%s], 65;"), threads=64)


@pytest.mark.parametrize(
    "body, reason",
    [
        ("st.global.u64 [%b+8], %d15;", "writes outside of global memory"),
        ("ld.global.u64 %d0, [%a+-8];", "reads outside of global memory"),
        ("st.global.u64 [%a], %d15;", "writes to memory that may only be read"),
        ("ld.global.v2.u32 {%r0, %r1}, [%a+4];", "a misaligned address"),
        ("st.shared.u32 [%s+1024], %r0;", "outside of shared memory"),
        ("mbarrier.arrive.shared::cta.b64 _, [%s];", "an mbarrier that was not initialised"),
        ("bar.sync 0, 64;", "no thread can go on"),
        ("@%p0 bra OUT; bar.sync 17; OUT: ", "there are 16 barriers"),
        ("sin.approx.f32 %f0, %f1;", "the emulator does not know this instruction"),
        ("cp.async.ca.shared.global [%s], [%a], 8;", "ends with copies that it does not wait for"),
        ("trap;", "the kernel stopped itself"),
    ],
)
def test_what_a_gpu_would_not_forgive_is_named_with_its_place(emulator, body, reason):
    with pytest.raises(RiaError, match=reason) as raised:
        run(emulator, f"setp.eq.s32 %p0, %t, -1; {body}")
    assert "PTX line" in str(raised.value) or "at line" in str(raised.value)

"""The CUDA kernels' results without a GPU: their own host code and their PTX, run by the emulator of emulator/.

Only the machine is not real: tensor maps, cluster launches, barriers, tensor cores and memory are the emulator's,
written from NVIDIA's manuals. These tests say nothing about speed.
"""

import pytest
import torch
from cuda_libraries import chosen_tiles, emulated
from packed_layers import pack

from ria_vllm.errors import RiaError
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, FP8, INT8
from ria_vllm.format.token_rounding import FP8_DTYPE, quantize_fp8
from ria_vllm.serve.kernels import int8_inputs
from ria_vllm.serve.kernels.cuda import backend as cutlass
from ria_vllm.serve.kernels.cuda.tiles import (
    COUNTER_BYTES,
    DATA_PARALLEL,
    HEURISTIC,
    STREAM_K,
    WORKSPACE_BYTES,
)

pytestmark = pytest.mark.slow

TILES = [(arch, tile.name) for arch in ("80", "90a", "100a", "120") for tile in chosen_tiles(arch)]
SPLITS = (DATA_PARALLEL, HEURISTIC, STREAM_K, 2, 3, 5, 9)
# out-features, in-features, tokens: less than any tile; rows and columns that fill no tile; more steps of K than any
# pipeline has stages; more tiles than SMs.
SHAPES = [(8, 64, 1), (136, 192, 7), (200, 1152, 33), (264, 2624, 16), (392, 1088, 300)]


class Product:
    """The operands of a product, and what it must be in float64."""

    def __init__(self, out_features, in_features, tokens, dtype, output):
        generator = torch.Generator().manual_seed(out_features + in_features + tokens)
        dense = torch.randn(out_features, in_features, generator=generator).to(output)
        x = torch.randn(tokens, in_features, generator=generator).to(output)
        self.compressed, self.bitmask = sparse24.compress(dense)
        self.values, self.x, self.scales = self.compressed, x, None
        if dtype == FP8_DTYPE:
            self.values, weight_scales = quantize_fp8(self.compressed)
            self.x, x_scales = quantize_fp8(x)
            self.scales = (weight_scales, x_scales)
        if dtype == torch.int8:
            drawn = {"generator": generator, "dtype": torch.int8}
            self.values = torch.randint(-128, 128, self.compressed.shape, **drawn)
            self.x = torch.randint(-127, 128, x.shape, **drawn)
            self.scales = tuple((torch.rand(n, generator=generator) + 0.5) / 1000 for n in (out_features, tokens))
        self.bias = torch.randn(out_features, generator=generator).to(output)
        self.stored, self.inputs = sparse24.decompress(self.values.double(), self.bitmask), self.x.double()
        if self.scales:
            self.stored = self.stored * self.scales[0].double()[:, None]
            self.inputs = self.inputs * self.scales[1].double()[:, None]
        self.y = torch.full((tokens, out_features), float("nan"), dtype=output)

    def check(self, y, bias):
        """y may be off by half an ulp, and by the errors of fp32 accumulation; sums of integers are exact."""
        if self.values.dtype == torch.int8:
            sums = self.x.long() @ sparse24.decompress(self.values.long(), self.bitmask).t()
            expected = sums.float() * self.scales[0] * self.scales[1][:, None]
            assert torch.equal(y, (expected if bias is None else expected + bias.float()).to(y.dtype))
            return
        exact = self.inputs @ self.stored.t() + (bias.double() if bias is not None else 0)
        sums = self.inputs.abs() @ self.stored.abs().t()
        room = exact.abs() * torch.finfo(y.dtype).eps * 0.501 + sums * 2e-6 + 1e-30
        assert bool(torch.isfinite(y).all())
        assert bool(((y.double() - exact).abs() <= room).all()), float(((y.double() - exact).abs() / room).max())


def dtypes_of(tile):
    """The (operand dtype, output dtype) pairs that the tile multiplies."""
    narrow = {"fp8": FP8_DTYPE, "int8": torch.int8}.get(tile.split("_")[0])
    return [(narrow or output, output) for output in (torch.bfloat16, torch.float16)]


def columns_of(tile, in_features):
    """int8 tiles take K in steps of 128, not 64."""
    return in_features * (2 if tile.startswith("int8_") else 1)


@pytest.fixture
def library(arch):
    """The architecture's library, whose settings a test may change."""
    return emulated(arch)


@pytest.fixture
def workspace():
    """A workspace whose counters are zero, as they must be; the rest holds what other products left behind."""
    memory = torch.full((WORKSPACE_BYTES,), 0xFF, dtype=torch.uint8)
    memory[:COUNTER_BYTES] = 0
    return memory


@pytest.mark.parametrize("arch, tile", TILES)
@pytest.mark.parametrize("seed", [0, 1])
def test_products_are_those_of_float64(library, tile, seed, workspace):
    """For each shape and each division of K, on a GPU with so few SMs that blocks take several tiles, in any order.

    One half of these is under each seed, and in each half both dtypes are with each shape.
    """
    library.seed = seed
    index = library.tile_names.index(tile)
    for number, (out_features, in_features, tokens) in enumerate(SHAPES):
        in_features = columns_of(tile, in_features)
        for place, split_k in list(enumerate(SPLITS))[(seed + number) % 2 :: 2]:
            dtype, output = dtypes_of(tile)[(number + place // 2) % 2]
            product = Product(out_features, in_features, tokens, dtype, output)
            metadata = library.pack_metadata_on_device(product.bitmask, product.values.itemsize * 8)
            library.num_sms = (6, 14, 2)[(split_k + number) % 3]
            bias = product.bias if split_k != 2 else None
            sizes = (out_features, in_features)
            need = library.workspace_bytes(index, dtype, sizes, tokens, split_k, library.num_sms)
            assert need <= WORKSPACE_BYTES
            y = product.y.clone()
            operands = (product.x, product.values, metadata, bias, y, workspace[:need], product.scales)
            library.linear(index, split_k, *operands)
            product.check(y, bias)
            assert not workspace[:COUNTER_BYTES].any()


@pytest.mark.parametrize("arch, tile", TILES)
def test_a_product_repeats_bit_for_bit(library, tile, workspace):
    """No matter which block and which copy comes first."""
    library.num_sms = 6
    dtype, output = dtypes_of(tile)[0]
    product = Product(264, columns_of(tile, 1152), 70, dtype, output)
    metadata = library.pack_metadata(product.bitmask, product.values.itemsize * 8)
    for split_k in (STREAM_K, 3):
        results = []
        for library.seed in range(3):
            y = product.y.clone()
            operands = (product.x, product.values, metadata, product.bias, y, workspace, product.scales)
            library.linear(library.tile_names.index(tile), split_k, *operands)
            results.append(y)
        assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("arch", ["80", "90a", "100a", "120"])
@pytest.mark.parametrize("value_bits", [16, 8])
def test_the_gpu_packs_as_the_host_does(library, arch, value_bits):
    generator = torch.Generator().manual_seed(1)
    for out_features, in_features in [(8, 64), (200, 192), (1000, 448)]:
        bitmask = torch.randint(256, (out_features, in_features // 8), generator=generator, dtype=torch.uint8)
        if library.metadata_bytes(out_features, in_features, value_bits) < 0:
            assert value_bits == 8 and arch == "100a"
            continue
        host = library.pack_metadata(bitmask, value_bits)
        assert torch.equal(library.pack_metadata_on_device(bitmask, value_bits), host)


@pytest.mark.parametrize("arch, tile", TILES)
def test_nothing_outside_of_the_operands_is_touched(library, tile, workspace):
    """The emulator must notice accesses to a missing row or a missing byte of workspace.

    Otherwise its silence in the other tests would mean nothing.
    """
    dtype, output = dtypes_of(tile)[0]
    sizes = 136, columns_of(tile, 192)
    product = Product(*sizes, 9, dtype, output)
    metadata = library.pack_metadata(product.bitmask, product.values.itemsize * 8)
    index, split_k = library.tile_names.index(tile), 3
    need = library.workspace_bytes(index, dtype, sizes, 9, split_k, library.num_sms)

    def linear(x, y, memory):
        workspace[:COUNTER_BYTES] = 0
        operands = (product.x, product.values, metadata, None, product.y, workspace[:need], product.scales)
        with library.memory([x, product.values, metadata, *(product.scales or ())], [y, memory]):
            super(type(library), library).linear(index, split_k, *operands)

    linear(product.x, product.y, workspace[:need])
    product.check(product.y, None)
    with pytest.raises(RiaError, match="reads outside of global memory"):
        linear(product.x[:-1], product.y, workspace[:need])
    with pytest.raises(RiaError, match="writes outside of global memory"):
        linear(product.x, product.y[:-1], workspace[:need])
    if need > COUNTER_BYTES:  # the tile divides K
        with pytest.raises(RiaError, match="writes outside of global memory"):
            linear(product.x, product.y, workspace[: need - 1])


@pytest.fixture
def on_emulated_gpu(cutlass_on_cpu, workspace, dtype):
    """The backend's operators, for tensors on the CPU, backed by the emulated library that multiplies `dtype`."""
    library = emulated("80" if dtype == torch.int8 else "90a")
    library.seed = 7
    cutlass_on_cpu(library, library.num_sms, workspace)
    return library


@pytest.mark.parametrize(
    ("dtype", "leading", "gathered"),
    [
        *((torch.bfloat16, (2, 3), True), (torch.float16, (65,), False)),
        *((FP8_DTYPE, (1,), True), (FP8_DTYPE, (0,), False)),
        *((torch.int8, (2, 3), True), (torch.int8, (65,), False)),
    ],
)
def test_the_backend_from_the_checkpoint_to_the_output(on_emulated_gpu, dtype, leading, gathered):
    """With tiles chosen by the rules, rows at any address, and the input in its own order or gathered. int8 values and
    inputs are padded."""
    output = torch.bfloat16 if dtype.itemsize == 1 else dtype
    product = Product(200, 576, 1, dtype, output)
    parts = {"compressed": product.values, "bitmask": product.bitmask}
    if product.scales:
        parts["weight_scale"] = product.scales[0][:, None]
    rounded = torch.int8 if dtype == torch.int8 else None
    layer = pack(cutlass.CutlassKernel, parts, {FP8_DTYPE: FP8, torch.int8: INT8}.get(dtype, FLOAT), output, rounded)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*leading, 577, generator=generator).to(output)[..., 1:]
    assert x.data_ptr() % 16 or not x.numel()
    p = torch.randperm(576, generator=generator).int() if gathered else None
    y = layer(x, p, product.bias)
    assert y.shape == (*leading, 200) and y.dtype == output
    rows = (x.index_select(-1, p) if gathered else x).reshape(-1, 576)
    if rounded:
        assert torch.equal(y.reshape(-1, 200), int8_inputs.linear(rows, INT8, parts, product.bias).to(output))
        return
    product.inputs = rows.double()
    if product.scales:
        values, scales = quantize_fp8(rows)
        product.inputs = values.double() * scales.double()[:, None]
    product.check(y.reshape(-1, 200), product.bias)

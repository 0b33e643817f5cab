"""The CUDA kernels' results, without a GPU: their own host code and their PTX, run by the emulator of emulator/.

Everything on the way is the real thing but the machine: tensor maps, cluster launches, barriers, tensor cores and
memory are the emulator's, after NVIDIA's manuals. It says nothing of speed.
"""

import pytest
import torch
from compiled_cuda import chosen_tiles, emulated

from ria_vllm import sparse24
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import backend as cutlass
from ria_vllm.serve.kernels.cuda import fp8
from ria_vllm.serve.kernels.cuda.tiles import (
    COUNTER_BYTES,
    SPLIT_FORCED,
    SPLIT_HEURISTIC,
    SPLIT_NONE,
    WORKSPACE_BYTES,
    choose_tile,
)

pytestmark = pytest.mark.slow

TILES = [(arch, tile.name) for arch in ("80", "90a", "100a", "120") for tile in chosen_tiles(arch)]
SPLITS = (SPLIT_NONE, SPLIT_HEURISTIC, SPLIT_FORCED, 2, 3, 5, 9)
# out-features, in-features, tokens: less than any tile; rows and columns that fill no tile; more steps than any
# pipeline has stages; more tiles than multiprocessors.
SHAPES = [(8, 64, 1), (136, 192, 7), (200, 1152, 33), (264, 2624, 16), (392, 1088, 300)]


class Product:
    """One product and what it must be, in float64."""

    def __init__(self, out_features, in_features, tokens, dtype, output):
        generator = torch.Generator().manual_seed(out_features + in_features + tokens)
        dense = torch.randn(out_features, in_features, generator=generator).to(output)
        x = torch.randn(tokens, in_features, generator=generator).to(output)
        self.compressed, self.bitmask = sparse24.compress(dense)
        self.values, self.x, self.scales = self.compressed, x, None
        if dtype == fp8.DTYPE:
            self.values, weight_scales = fp8.quantize(self.compressed)
            self.x, x_scales = fp8.quantize(x)
            self.scales = (weight_scales, x_scales)
        self.bias = torch.randn(out_features, generator=generator).to(output)
        self.stored, self.inputs = sparse24.decompress(self.values.double(), self.bitmask), self.x.double()
        if self.scales:
            self.stored = self.stored * self.scales[0].double()[:, None]
            self.inputs = self.inputs * self.scales[1].double()[:, None]
        self.y = torch.full((tokens, out_features), float("nan"), dtype=output)

    def check(self, y, bias):
        """Half an ulp of y, and an fp32 accumulation's errors."""
        exact = self.inputs @ self.stored.t() + (bias.double() if bias is not None else 0)
        sums = self.inputs.abs() @ self.stored.abs().t()
        room = exact.abs() * torch.finfo(y.dtype).eps * 0.501 + sums * 2e-6 + 1e-30
        assert bool(torch.isfinite(y).all())
        assert bool(((y.double() - exact).abs() <= room).all()), float(((y.double() - exact).abs() / room).max())


def dtypes_of(tile):
    """(operands, output) that the tile multiplies."""
    both = (torch.bfloat16, torch.float16)
    return [(fp8.DTYPE, output) for output in both] if tile.startswith("fp8_") else [(dtype, dtype) for dtype in both]


@pytest.fixture
def library(arch):
    """The architecture's library, whose settings a test may change."""
    return emulated(arch)


@pytest.fixture
def workspace():
    """Counters zero, as they must be, and what other products left behind in the rest."""
    memory = torch.full((WORKSPACE_BYTES,), 0xFF, dtype=torch.uint8)
    memory[:COUNTER_BYTES] = 0
    return memory


@pytest.mark.parametrize("arch, tile", TILES)
@pytest.mark.parametrize("seed", [0, 1])
def test_products_are_those_of_float64(library, tile, seed, workspace):
    """With each division of K, on a GPU of so few multiprocessors that blocks take several tiles, in whatever order."""
    library.seed = seed
    index = library.tile_names.index(tile)
    for number, (out_features, in_features, tokens) in enumerate(SHAPES):
        dtype, output = dtypes_of(tile)[(seed + number) % 2]
        product = Product(out_features, in_features, tokens, dtype, output)
        metadata = library.pack_metadata_on_device(product.bitmask, product.values.itemsize * 8)
        for split in SPLITS:
            library.multiprocessors = (6, 14, 2)[(split + number) % 3]
            bias = product.bias if split != 2 else None
            sizes = (out_features, in_features)
            need = library.workspace_bytes(index, dtype, sizes, tokens, split, library.multiprocessors)
            assert need <= WORKSPACE_BYTES
            y = product.y.clone()
            operands = (product.x, product.values, metadata, bias, y, workspace[:need], product.scales)
            library.linear(index, split, *operands)
            product.check(y, bias)
            assert not workspace[:COUNTER_BYTES].any()


@pytest.mark.parametrize("arch, tile", TILES)
def test_a_product_repeats_bit_for_bit(library, tile, workspace):
    """Whichever block and whichever copy comes first."""
    library.multiprocessors = 6
    dtype, output = dtypes_of(tile)[0]
    product = Product(264, 1152, 70, dtype, output)
    metadata = library.pack_metadata(product.bitmask, product.values.itemsize * 8)
    for split in (SPLIT_FORCED, 3):
        results = []
        for library.seed in range(5):
            y = product.y.clone()
            operands = (product.x, product.values, metadata, product.bias, y, workspace, product.scales)
            library.linear(library.tile_names.index(tile), split, *operands)
            results.append(y)
        assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("arch", ["80", "90a", "100a", "120"])
@pytest.mark.parametrize("value_bits", [16, 8])
def test_the_gpu_packs_as_the_host_does(library, arch, value_bits):
    generator = torch.Generator().manual_seed(1)
    for out_features, in_features in [(8, 64), (200, 192), (1000, 448)]:
        bitmask = torch.randint(256, (out_features, in_features // 8), generator=generator, dtype=torch.uint8)
        if library.metadata_bytes(out_features, in_features, value_bits) < 0:
            assert value_bits == 8 and arch != "90a"
            continue
        host = library.pack_metadata(bitmask, value_bits)
        assert torch.equal(library.pack_metadata_on_device(bitmask, value_bits), host)


@pytest.mark.parametrize("arch, tile", TILES)
def test_nothing_outside_of_the_operands_is_touched(library, tile, workspace):
    """A row less than the kernel was told of, or a byte less of workspace: the emulator must see the access, so that
    its silence means something."""
    dtype, output = dtypes_of(tile)[0]
    product = Product(136, 192, 9, dtype, output)
    metadata = library.pack_metadata(product.bitmask, product.values.itemsize * 8)
    index, split = library.tile_names.index(tile), 3
    need = library.workspace_bytes(index, dtype, (136, 192), 9, split, library.multiprocessors)

    def linear(x, y, memory):
        workspace[:COUNTER_BYTES] = 0
        operands = (product.x, product.values, metadata, None, product.y, workspace[:need], product.scales)
        with library.memory([x, product.values, metadata, *(product.scales or ())], [y, memory]):
            super(type(library), library).linear(index, split, *operands)

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
def on_emulated_hopper(cutlass_on_cpu, workspace):
    """The backend's operators, for tensors on the CPU, with the emulated library behind them."""
    library = emulated("90a")
    library.seed = 7
    cutlass_on_cpu(library, library.multiprocessors, workspace)
    return library


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, fp8.DTYPE])
@pytest.mark.parametrize("leading", [(1,), (2, 3), (65,), (0,)])
@pytest.mark.parametrize("gathered", [False, True])
def test_the_backend_from_the_checkpoint_to_the_output(on_emulated_hopper, dtype, leading, gathered):
    """Tiles chosen by the rules, rows that start anywhere in memory, the input in its own order or gathered."""
    output = torch.bfloat16 if dtype == fp8.DTYPE else dtype
    product = Product(200, 576, 1, dtype, output)
    packed = cutlass.pack(product.values, product.bitmask, *([product.scales[0]] if product.scales else []))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*leading, 577, generator=generator).to(output)[..., 1:]
    assert x.data_ptr() % 16 or not x.numel()
    order = torch.randperm(576, generator=generator).int() if gathered else None
    y = cutlass.apply(x, packed, 200, order, product.bias)
    assert y.shape == (*leading, 200) and y.dtype == output
    rows = (x.index_select(-1, order) if gathered else x).reshape(-1, 576)
    product.inputs = rows.double()
    if product.scales:
        values, scales = fp8.quantize(rows)
        product.inputs = values.double() * scales.double()[:, None]
    product.check(y.reshape(-1, 200), product.bias)


BUSY = [
    *((arch, (512, 8192, 1), 0.9) for arch in ("80", "90a", "100a", "120")),
    *((arch, (640, 4096, 16), 0.6) for arch in ("80", "90a", "100a", "120")),
    # As 11008 rows are to a Hopper, where CUTLASS would leave K whole and a third of the multiprocessors idle.
    *((arch, (1024, 4096, 1), 0.9) for arch in ("90a", "100a")),
]


@pytest.mark.parametrize("arch, shape, least", [case for case in BUSY if chosen_tiles(case[0])])
def test_few_rows_keep_the_multiprocessors_busy(library, shape, least, workspace):
    """Fewer tiles than multiprocessors: 4, 5 and 8 for 12. K is divided so that hardly one idles, and that all do at
    least so large a part of what the slowest does."""
    library.multiprocessors = 12
    product = Product(*shape, torch.bfloat16, torch.bfloat16)
    tile, split = choose_tile(library, torch.bfloat16, *shape, library.multiprocessors)
    metadata = library.pack_metadata(product.bitmask)
    library.linear(tile, split, product.x, product.values, metadata, product.bias, product.y, workspace)
    product.check(product.y, product.bias)
    blocks, most, total = library.emulator.load()
    assert blocks >= 10 and total / (12 * most) > least, (blocks, most, total)

"""Which kernel serves a layer."""

from dataclasses import replace

import pytest
import torch
from packed_layers import pack, random_parts

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FORMATS, FP8, INT8, INTEGERS
from ria_vllm.format.pattern import PATTERNS, TWO_OF_FOUR
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.cpu.backend import CpuKernel
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.kernels.torch.cusparselt import CusparseltKernel

CPU, BF16, FP16 = torch.device("cpu"), torch.bfloat16, torch.float16


def layer(format=FLOAT, act_dtype=BF16, out_features=16, in_features=64, device=CPU):
    return LinearLayerConfig(device, act_dtype, format, out_features, in_features)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice of a user's, and nothing that another test has found out."""
    monkeypatch.delenv(registry.KERNEL_VARIABLE, raising=False)
    forget = registry.self_test.cache_clear
    forget()
    yield
    forget()


def test_the_first_kernel_that_can_serve_the_layer():
    assert registry.choose(layer()).kernel is CpuKernel
    assert registry.choose(layer(in_features=100)).kernel is ReferenceKernel
    reasons = dict(registry.explain(layer(in_features=100)))
    assert reasons["cpu"] == "in-features 100 are not a multiple of 64" and reasons["reference"] is None
    with pytest.raises(
        RiaError, match="no kernel can serve a 16 x 64 layer with float weights and float64 activations on cpu"
    ):
        registry.choose(layer(act_dtype=torch.float64))


def test_a_forced_kernel(monkeypatch):
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "reference")
    assert registry.choose(layer()).kernel is ReferenceKernel
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "cpu")
    with pytest.raises(
        RiaError, match="RIA_VLLM_BACKEND=cpu cannot serve a 16 x 100 layer .*: in-features 100 are not"
    ):
        registry.choose(layer(in_features=100))
    with pytest.raises(RiaError, match="in-features 100 are not"):  # fp8 would be widened: that is not in the way
        registry.choose(layer(FP8, in_features=100))
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "fast")
    with pytest.raises(
        RiaError, match="RIA_VLLM_BACKEND=fast is not a kernel for a 16 x .* choose from .*cpu, reference"
    ):
        registry.choose(layer())


def test_linears_that_are_asked_for_dense_have_no_other_kernel(monkeypatch):
    monkeypatch.setenv("RIA_VLLM_DENSE", "1")
    assert registry.explain(layer()) == [("dense", None)]
    assert str(registry.choose(layer(INT8))) == "dense with int8 widened to bfloat16"
    monkeypatch.setenv("RIA_VLLM_DENSE", "yes")
    with pytest.raises(RiaError, match="RIA_VLLM_DENSE=yes: set it to 1"):
        registry.choose(layer())


@pytest.mark.parametrize(
    "format, act_dtype, chosen",
    [(FORMATS["int4-g32"], FP16, "cpu"), (FP8, FP16, "cpu with fp8 widened to float16")],
)
def test_weights_are_widened_only_where_no_kernel_keeps_them(format, act_dtype, chosen):
    choice = registry.choose(layer(format, act_dtype))
    assert str(choice) == chosen and choice.kernel is CpuKernel
    assert choice.config.weight_format == (format if choice.widened_from is None else FLOAT)


class RoundsInt4(ReferenceKernel):
    """It would be fast, and takes int4 weights under int8 inputs alone."""

    name, is_fallback = "rounds", False

    @staticmethod
    def can_implement(config):
        taken = config.input_dtype == torch.int8 and config.weight_format == FORMATS["int4"]
        return None if taken else "int4 weights with int8 inputs only"


@pytest.mark.parametrize(
    "format, chosen",
    [
        ("int4", "rounds with inputs rounded to int8"),
        ("int8", "widens with inputs not rounded to int8"),
        ("int4-g64", "widens with int4-g64 widened to bfloat16 and inputs not rounded to int8"),
    ],
)
def test_inputs_are_rounded_where_a_fast_kernel_does_it(monkeypatch, format, chosen):
    class Widens(ReferenceKernel):
        name, is_fallback = "widens", False

        @staticmethod
        def can_implement(config):
            taken = config.input_dtype is None and config.weight_format in (FLOAT, INT8)
            return None if taken else "unrounded only"

    monkeypatch.setattr(registry, "LINEAR_KERNELS", (Widens, RoundsInt4, ReferenceKernel))
    config = replace(layer(FORMATS[format], in_features=128), input_dtype=torch.int8)
    choice = registry.choose(config)
    assert str(choice) == chosen
    assert choice.config.input_dtype == (None if choice.unrounded else torch.int8)
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "reference")
    forced = registry.choose(config)
    assert str(forced) == "reference with inputs rounded to int8" and forced.config == config
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "rounds")
    with pytest.raises(RiaError, match="cannot serve a 16 x 128 layer with float weights"):
        registry.choose(replace(config, weight_format=FLOAT))


def test_a_kernel_that_rounds_wrongly_is_passed_over(monkeypatch):
    """Also one that knows nothing of rounding: the log would say that it does it."""
    config = replace(layer(FORMATS["int4"]), input_dtype=torch.int8)
    assert registry.reason_against(RoundsInt4, config) is None
    registry.self_test.cache_clear()

    def apply(config, x, packed, input_permutation, bias):
        return ReferenceKernel.apply(replace(config, input_dtype=None), x, packed, input_permutation, bias)

    monkeypatch.setattr(RoundsInt4, "apply", staticmethod(apply))
    assert registry.reason_against(RoundsInt4, config) == WRONG


@pytest.mark.parametrize(
    "format, act_dtype, out_features, chosen",
    [
        (FP8, BF16, 64, "cutlass"),
        (FP8, torch.float32, 64, "reference"),
        (FP8, BF16, 12, "reference"),
        (INT8, BF16, 64, "cutlass with int8 widened to bfloat16"),
    ],
)
def test_a_hopper_keeps_fp8(hopper_layers, format, act_dtype, out_features, chosen):
    assert str(registry.choose(layer(format, act_dtype, out_features))) == chosen


@pytest.mark.parametrize(
    "format, act_dtype, out_features, chosen",
    [
        (INT8, BF16, 64, "cutlass with inputs rounded to int8"),
        (INT8, FP16, 72, "cutlass with inputs rounded to int8"),
        (INT8, torch.float32, 64, "reference with inputs rounded to int8"),
        (FORMATS["int4"], BF16, 64, "cutlass with int4 widened to bfloat16 and inputs not rounded to int8"),
    ],
)
def test_an_ampere_rounds_inputs_to_int8(ampere_layers, format, act_dtype, out_features, chosen):
    """Also with in-features that its tiles take only with padding."""
    config = replace(layer(format, act_dtype, out_features, 192), input_dtype=torch.int8)
    assert str(registry.choose(config)) == chosen


def test_a_hopper_does_not(hopper_layers):
    config = replace(layer(INT8, BF16, 64, 128), input_dtype=torch.int8)
    assert "no tile for a 64 x 128 layer of torch.int8" in dict(registry.explain(config))["cutlass"]
    assert str(registry.choose(config)) == "cutlass with int8 widened to bfloat16 and inputs not rounded to int8"


def test_a_kernel_is_asked_for_the_patterns_that_it_names_alone(monkeypatch):
    """One that was written for 2:4 would read positions that are not there."""

    class Wide(ReferenceKernel):
        name, is_fallback = "wide", False

    class Narrow(Wide):
        name, can_implement = "narrow", None  # asking would raise
        patterns = (TWO_OF_FOUR,)

    config = replace(layer(INT8, in_features=128), input_dtype=torch.int8, pattern=PATTERNS["8:16"])
    monkeypatch.setattr(registry, "LINEAR_KERNELS", (Narrow, Wide, ReferenceKernel))
    assert registry.explain(config)[:2] == [("narrow", "no 8:16 weights; 2:4 only"), ("wide", None)]
    assert registry.choose(config).kernel is Wide and "int8 8:16 weights" in str(config)
    del Narrow.patterns
    monkeypatch.delattr(ReferenceKernel, "patterns")
    assert registry.explain(config)[0] == ("narrow", "no 8:16 weights; 2:4 only")


def test_a_gpus_kernels_are_tried_in_order(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(registry, "self_test", lambda *_: None)
    for kernel in (CutlassKernel, CusparseltKernel):
        monkeypatch.setattr(kernel, "is_supported", staticmethod(lambda device: None))
    monkeypatch.setattr(CutlassKernel, "can_implement", staticmethod(lambda config: "too old"))
    config = layer(device=gpu)
    assert registry.choose(config).kernel is CusparseltKernel
    assert registry.explain(config)[:2] == [("cutlass", "too old"), ("cusparselt", None)]
    # On GPUs without a kernel for int8, the fast kernels go first with 16-bit weights.
    assert str(registry.choose(layer(INT8, device=gpu))) == "cusparselt with int8 widened to bfloat16"
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "cutlass")
    with pytest.raises(RiaError, match="RIA_VLLM_BACKEND=cutlass cannot serve .* too old"):
        registry.choose(config)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kernel", registry.LINEAR_KERNELS, ids=lambda kernel: kernel.name)
def test_each_kernel_multiplies_every_format_that_it_takes(kernel, format, hopper, monkeypatch):
    monkeypatch.setattr(CutlassKernel, "is_supported", staticmethod(lambda device: None))
    taken = 0
    for act_dtype in (BF16, FP16, torch.float32):
        config = layer(format, act_dtype, 72, 128)
        if kernel.is_supported(CPU) or kernel.can_implement(config):
            continue
        taken += 1
        assert registry.self_test(kernel, CPU, act_dtype, format) is None
        parts, dense = random_parts(72, 128, format, act_dtype)
        x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).to(act_dtype)
        p = torch.randperm(128, dtype=torch.int32)
        bias = torch.randn(72).to(act_dtype)
        y = pack(kernel, parts, format, act_dtype)(x, p, bias)
        want = x.double()[:, p.long()] @ dense.T + bias.double()
        # fp8's kernel rounds activations to 3 bits of mantissa.
        rtol = 2**-4 if format == FP8 and kernel is CutlassKernel else 2**-7
        torch.testing.assert_close(y.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))
        assert y.dtype == act_dtype
    expected = {(CutlassKernel, FLOAT): 2, (CutlassKernel, FP8): 2, (CpuKernel, FLOAT): 3}
    expected |= {(CpuKernel, integers): 3 for integers in INTEGERS.values()}
    assert taken == (3 if kernel is ReferenceKernel else expected.get((kernel, format), 0))


def broken(*_):
    raise RuntimeError("no kernel image is available\nfor this device")


def silent(*_):
    raise RuntimeError("\n")


def wrong(change_of_x=lambda x: x, change_of_y=lambda y: y):
    """CpuKernel.apply, but for a change on the way in or out."""

    def apply(config, x, packed, input_permutation, bias):
        y = torch.ops.ria.sparse24_linear.cpu(change_of_x(x), packed[0], config.out_features, input_permutation, bias)
        return change_of_y(y)

    return {"apply": apply}


FAILS, WRONG = "a small product fails on this device", "a small product comes out wrong on this device"
SWAP = [1, 0, *range(2, 64)]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pack": broken}, f"{FAILS}: no kernel image is available"),
        ({"apply": lambda *_: None}, FAILS),
        ({"apply": silent}, f"{FAILS}: RuntimeError"),
        (wrong(change_of_x=lambda x: x[:, SWAP]), WRONG),
        (wrong(change_of_y=lambda y: y.flip(-1)), WRONG),
        (wrong(change_of_y=lambda y: y * 1.2), WRONG),
        (wrong(change_of_y=lambda y: y * torch.nan), WRONG),
        (wrong(change_of_y=lambda y: y[:, :-1]), WRONG),
    ],
)
def test_a_kernel_that_multiplies_wrongly_is_passed_over(monkeypatch, change, words):
    for name, function in change.items():
        monkeypatch.setattr(CpuKernel, name, staticmethod(function))
    assert registry.reason_against(CpuKernel, layer(INT8)).startswith(words)
    assert registry.choose(layer(INT8)).kernel is ReferenceKernel


def test_defaults_that_vllm_sets_while_it_builds_a_model_do_not_matter():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(FP16)
        with torch.device("meta"):
            assert registry.choose(layer()).kernel is CpuKernel
    finally:
        torch.set_default_dtype(before)


def test_the_first_size_that_a_kernel_takes_is_tested():
    class Wide(CpuKernel):
        pack = staticmethod(broken)

        @staticmethod
        def can_implement(config):
            return None if config.out_features == 128 else "128 only"

    assert registry.reason_against(Wide, replace(layer(), out_features=128)).startswith(FAILS)

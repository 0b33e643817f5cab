"""vLLM on checkpoints in compressed-tensors' packed forms, against Hugging Face on the weights that they stand for."""

import pytest
import tiny
from compare import check, differences, generate, job_of
from compressed_tensors_writer import needs_writer
from packed_checkpoints import Packed, arguments, write
from runs import ONE_THREAD_EACH, TWO_RANKS

pytestmark = [pytest.mark.slow, needs_writer]

SPARSE = {"format": "dense", "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"], "ignore": []}
MARLIN = Packed("marlin-24", arguments(4, 128))
PACK = Packed("pack-quantized", arguments(4, 128), sparsity=SPARSE)

# Name of the run: (how the checkpoint is written, changes to the job)
RUNS = {
    "marlin-24, int4 in groups": (MARLIN, {}),
    "marlin-24, int8 in groups": (Packed("marlin-24", arguments(8, 128)), {}),
    "pack-quantized, bfloat16": (PACK, {"engine": {"dtype": "bfloat16"}}),
    "pack-quantized, int8 by channel, one linear not 2:4": (
        Packed("pack-quantized", arguments(8), spoiled="1.mlp.down_proj", sparsity=SPARSE), {},
    ),
}  # fmt: skip
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
W8A8 = "int-quantized, int8 by channel, inputs by token"

# The same, by the kernel that multiplies all weights as they are stored.
AS_STORED = {
    W8A8: (Packed("int-quantized", arguments(8), BY_TOKEN, sparsity=SPARSE), {}),
    "pack-quantized on two ranks, one linear not 2:4": (
        Packed("pack-quantized", arguments(4, 128), spoiled="0.self_attn.o_proj", sparsity=SPARSE),
        {"engine": TWO_RANKS},
    ),
}


def run(folder, group, **environment):
    models = write({folder / str(i): how for i, (how, _) in enumerate(group.values())})
    jobs = [job_of(folder / str(i), changes) for i, (_, changes) in enumerate(group.values())]
    results = generate(folder / "run", jobs, **environment)
    return dict(zip(group, zip(models, results, strict=True), strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run(tmp_path_factory.mktemp("packed"), RUNS)


@pytest.fixture(scope="module")
def as_stored(tmp_path_factory):
    return run(tmp_path_factory.mktemp("as-stored"), AS_STORED, RIA_VLLM_BACKEND="reference", **ONE_THREAD_EACH)


@pytest.mark.parametrize("name", RUNS)
def test_served_as_the_weights_say(runs, name):
    check(*runs[name], half=name.endswith("bfloat16"))


@pytest.mark.parametrize("name", [name for name in AS_STORED if name != W8A8])
def test_two_ranks(as_stored, name):
    check(*as_stored[name])


def rounded(module, inputs):
    """The input with each token rounded to 127 steps of its largest magnitude."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return ((inputs[0] / scale).round() * scale,)


def test_inputs_are_rounded_where_config_json_says_so(as_stored):
    """A sum in another order may round an input to the next step, which costs more than in `check`."""
    model, results = as_stored[W8A8]
    without = differences(model, results)
    hooks = [linear.register_forward_pre_hook(rounded) for linear in tiny.linears(model).values()]
    off = differences(model, results)
    for hook in hooks:
        hook.remove()
    assert off.median() < 1e-4 and off.max() < 0.02
    assert without.median() > 1e-3

"""What `compress` makes of a few types, on two ranks of tensor parallelism, against transformers on the export."""

import pytest
from compare import generate
from runs import ALL_GATHER, ONE_THREAD_EACH, TWO_RANKS
from zoo.agreement import agreement, job
from zoo.check import disagreement
from zoo.family import dense_folder, pruned_folders
from zoo.toys import TOYS

from ria_vllm.checkpoint.reader import Reader

pytestmark = pytest.mark.slow

# Type -> engine. The types have what else is cut between ranks: a shared expert and its gate, attention's gate, a short
# convolution, Mamba-2.
RUNS = {"qwen2_moe": {"enable_expert_parallel": True}, "qwen3_next": {}, "lfm2": {}, "granitemoehybrid": {}}
# Consumers that tensor parallelism cuts along their input, and into whose producers no fold goes.
BLOCKS = {
    "qwen3_next": "layers.0.linear_attn.out_proj",
    "lfm2": "layers.0.conv.out_proj",
    "granitemoehybrid": "layers.0.mamba.out_proj",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("two-ranks")


@pytest.fixture(scope="module")
def served(place):
    """Type -> (the exported folder, vLLM's results)."""
    jobs, exported = [], {}
    for name, engine in RUNS.items():
        dense_folder(name, TOYS[name], place)
        pruned, exported[name], *_ = pruned_folders(name, TOYS[name], place)
        given = job(pruned, TOYS[name])
        jobs.append(given | {"engine": given["engine"] | TWO_RANKS | engine})
    results = generate(place / "run", jobs, **ONE_THREAD_EACH)
    return {name: (exported[name], result) for name, result in zip(RUNS, results, strict=True)}


@pytest.mark.parametrize("name", RUNS)
def test_as_transformers(served, name):
    exported, result = served[name]
    assert "error" not in result, result
    assert not disagreement(agreement(result, exported, TOYS[name]), TOYS[name].dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_no_rank_gathers_from_another(served, place, name):
    """A consumer that gathers its input itself does so inside blocks. `test_vllm` has runs that warn."""
    reader = Reader(place / name / "pruned")
    consumer = f"model.{BLOCKS[name]}"
    folded = {fold for fold, _, _ in reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names))}
    p = reader.permutations[consumer].tolist()
    assert consumer not in folded and p != sorted(p)
    assert ALL_GATHER not in (place / "run" / "rank0of2" / "log").read_text()

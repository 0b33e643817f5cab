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

EXPERTS = {"enable_expert_parallel": True}
# Name of the run: (type, engine). The types have what else is cut between ranks: a shared expert and its gate,
# attention's gate, kv_b_proj, a short convolution, Mamba-2.
RUNS = {
    "shared expert": ("qwen2_moe", {}),
    "shared expert, expert parallel": ("qwen2_moe", EXPERTS),
    "gated attention": ("qwen3_next", {}),
    "latent attention": ("deepseek_v2", {}),
    "short convolution": ("lfm2", {}),
    "Mamba-2": ("granitemoehybrid", {}),
    "no folds": ("olmo2", {}),
}


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
    """Name of the run -> (the exported folder, vLLM's results)."""
    folders = {}
    for name in dict.fromkeys(name for name, _ in RUNS.values()):
        dense_folder(name, TOYS[name], place)
        folders[name] = pruned_folders(name, TOYS[name], place)[:2]
    jobs = []
    for name, engine in RUNS.values():
        given = job(folders[name][0], TOYS[name])
        jobs.append(given | {"engine": given["engine"] | TWO_RANKS | engine})
    results = generate(place / "run", jobs, **ONE_THREAD_EACH)
    return {run: (folders[name][1], result) for (run, (name, _)), result in zip(RUNS.items(), results, strict=True)}


@pytest.mark.parametrize("run", RUNS)
def test_as_transformers(served, run):
    exported, result = served[run]
    toy = TOYS[RUNS[run][0]]
    assert "error" not in result, result
    assert not disagreement(agreement(result, exported, toy), toy.dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_no_rank_gathers_from_another(served, place, name):
    """A consumer that reorders its input itself does so inside blocks. `test_vllm` has runs that warn."""
    reader = Reader(place / name / "pruned")
    consumer = f"model.{BLOCKS[name]}"
    folded = {fold for fold, _, _ in reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names))}
    order = reader.permutations[consumer].tolist()
    assert consumer not in folded and order != sorted(order)
    assert ALL_GATHER not in (place / "run" / "rank0of2" / "log").read_text()

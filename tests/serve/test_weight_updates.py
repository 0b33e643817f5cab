"""Reloads and weight transfers in whole engines of vLLM, which then answer as one that was started with these weights.

`test_reload_table` has every kind of layer and sequence, without an engine.
"""

import shutil
from pathlib import Path

import mixtures
import pytest
import tiny
import torch
from compare import generate, job_of
from families import LATENT_ATTENTION
from runs import ONE_THREAD_EACH, TWO_RANKS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo.family import calibration
from zoo.toy import build
from zoo.toys import TOYS

from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor

pytestmark = pytest.mark.slow


def plain(family, **settings):
    """Writes a checkpoint of a training and returns its folder."""

    def write(out, seed):
        tiny.write(tiny.FAMILIES[family], out, permuted=False, seed=seed, **settings)
        return out

    return write


def hybrid(out, seed):
    """Mamba-2 and attention, and experts."""
    toy = TOYS["granitemoehybrid"]
    dense, rng = build("granitemoehybrid", toy, out / "dense"), torch.Generator().manual_seed(seed)
    weights = load_file(dense / "model.safetensors")
    for one in weights.values():
        one *= (1 + torch.rand(one.shape, generator=rng) / 2).to(one.dtype)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(calibration=str(calibration(out)), samples=4, seq_len=32, reconstruct="none", permute="none")
    compress(str(dense), out / "pruned", recipe, Settings(), Monitor(shown=False))
    return out / "pruned"


FAMILIES = {
    "tied": plain("gemma2"),
    "Mamba-2": hybrid,
    "untied, with dense linears": plain("qwen2", dense=("o_proj", "down_proj")),
    "dense linears in int8": plain("qwen2", dense=("o_proj", "down_proj"), weights="int8", rounded=True, int8=True),
    "latent attention": plain("deepseek-v3"),
    "experts": lambda out, seed: mixtures.write(mixtures.FAMILIES["qwen3_moe"], out, permuted=False, seed=seed)[0],
}


def sequences(first, second):
    """Steps that end with the weights of `second`, or of `first`; whether each must be refused."""
    broken = {"send": second, "pieces": 3, "broken": "layernorm.weight"}
    return {
        "files, back": ([({"reload": second}, False), ({"reload": first}, False)], first),
        "refused": ([(broken, True)], first),
        "refused, then sent": ([(broken, True), ({"send": second, "pieces": 2}, False)], second),
    }  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request, tmp_path_factory):
    """Name of a run -> its results; `first` and `second` are fresh engines."""
    folder = tmp_path_factory.mktemp("updates")
    first, second = (str(FAMILIES[request.param](folder / str(seed), seed)) for seed in (1, 2))
    todo = sequences(first, second)
    # In bfloat16 vLLM packs convolutions, too, and its kernel for int8 is in use.
    dtype = {"dtype": "bfloat16" if request.param in ("Mamba-2", "dense linears in int8") else "float32"}
    dtype |= LATENT_ATTENTION if request.param == "latent attention" else {}
    jobs = [job_of(place, {"engine": dtype}) for place in (first, second)]
    jobs += [job_of(first, {"engine": dtype, "loads": steps}) for steps, _ in todo.values()]
    sent = [({"send": second, "pieces": 3}, False)]
    jobs.append(job_of(first, {"engine": dtype | {"load_format": "dummy"}, "loads": sent}))
    results = dict(zip(("first", "second", *todo, "dummies, then sent"), generate(folder / "run", jobs), strict=True))
    return results, {name: "first" if end == first else "second" for name, (_, end) in todo.items()}


@pytest.mark.parametrize("name", [*sequences("", ""), "dummies, then sent"])
def test_an_engine_answers_as_if_started_with_its_weights(runs, name):
    results, ends = runs
    got, want, other = results[name], results[ends.get(name, "second")], results["first"]
    assert "error" not in got, got
    if ends.get(name) != "first":
        assert torch.tensor([r["logprobs"] for r in want]).ne(torch.tensor([r["logprobs"] for r in other])).any()
    assert [(r["tokens"], r["prompt"]) for r in got] == [(r["tokens"], r["prompt"]) for r in want]


def test_after_refused_files_the_former_weights_are_served(tmp_path):
    """The proof finds another embedding, when all layers are new. What a trainer has sent is in no files."""
    first, second = (str(hybrid(tmp_path / str(seed), seed)) for seed in (1, 2))
    path = Path(shutil.copytree(second, tmp_path / "broken"), "model.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, path, metadata)
    refused, sent = ({"reload": str(path.parent)}, True), ({"send": second, "pieces": 1}, False)
    dtype = {"dtype": "bfloat16"}  # vLLM packs convolutions, too
    jobs = [job_of(folder, {"engine": dtype}) for folder in (first, second)]
    jobs += [job_of(first, {"engine": dtype, "loads": steps}) for steps in ([refused, refused], [sent, refused])]
    results = generate(tmp_path / "run", jobs)
    assert results[0] != results[1] and "error" not in results[0]
    assert results[2:] == results[:2]


def test_what_one_rank_refuses_no_rank_serves(tmp_path):
    """The other rank has all of its new weights by then, and may never be told that nothing follows."""
    write = plain("qwen2")
    first, second = (str(write(tmp_path / str(seed), seed)) for seed in (1, 2))
    broken = {"send": second, "pieces": 2, "broken": "norm.weight", "rank": 1}
    sequences = {
        "refused": ([(broken, True)], 0),
        "left": ([(broken | {"left": True}, True)], 0),
        "sent again": ([(broken, True), ({"send": second, "pieces": 3}, False)], 1),
    }
    jobs = [job_of(folder, {"engine": TWO_RANKS}) for folder in (first, second)]
    jobs += [job_of(first, {"engine": TWO_RANKS, "loads": steps}) for steps, _ in sequences.values()]
    results = generate(tmp_path / "run", jobs, **ONE_THREAD_EACH)
    for (name, (_, end)), got in zip(sequences.items(), results[2:], strict=True):
        assert "error" not in got, (name, got)
        answers = [[(r["tokens"], r["prompt"]) for r in one] for one in (got, results[end], results[1 - end])]
        assert answers[0] == answers[1] != answers[2], name

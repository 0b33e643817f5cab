"""Reloads and weight transfers in servers of vLLM, which then answer as one that was started with these weights.

`test_reload_table` has every kind of layer and sequence, without a server.
"""

import json
import re
import shutil
from pathlib import Path

import pruned_moe
import pytest
import tiny
import torch
from compare import generate, job_of
from damage import rewrite
from families import LATENT_ATTENTION
from runs import ONE_THREAD_EACH, TWO_RANKS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_updates import tensors
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
        tiny.write(tiny.FAMILIES.get(family, family), out, permuted=False, seed=seed, **settings)
        return out

    return write


def moe(family):
    return lambda out, seed: pruned_moe.write(pruned_moe.FAMILIES[family], out, permuted=False, seed=seed)[0]


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
    "rearranged rows": plain(tiny.FALCON),
    "Mamba-2": hybrid,
    "untied, with dense linears": plain("qwen2", dense=("o_proj", "down_proj")),
    "dense linears in int8": plain("qwen2", dense=("o_proj", "down_proj"), weights="int8", rounded=True, int8=True),
    "latent attention": plain("deepseek-v3"),
    "experts": moe("qwen3_moe"),
    "experts, rearranged rows": moe("llama4"),
}


def broken(folder):
    """A copy with an embedding that was not written so: the proof finds it, when all layers are new."""
    path = Path(shutil.copytree(folder, f"{folder}-broken"), "model.safetensors")
    found = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    (embedding,) = (name for name in found if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    found[embedding][-100:] += 1  # with two ranks, all of them are the second one's
    save_file(found, path, metadata)
    return {"reload": str(path.parent), "refused": True}


def stored_otherwise(folder):
    """A copy whose weights are the same, but called 4:8."""
    path = Path(shutil.copytree(folder, f"{folder}-otherwise"), "config.json")
    config = json.loads(path.read_text())
    config["quantization_config"]["sparsity_config"]["sparsity_structure"] = "4:8"
    path.write_text(json.dumps(config))
    return {"reload": str(path.parent), "refused": True}


def refused_names(folder):
    """Steps that send all tensors and one more: a dense weight of a pruned linear, a name that the model does not have,
    or a tensor for the second time."""
    found = dict(tensors(folder))
    pruned = next(name.removesuffix(".bitmask") for name in found if name.endswith(".bitmask"))
    again = next(name for name, tensor in found.items() if tensor.dim() == 1)
    more = {
        f"{pruned}.weight": found[f"{pruned}.shape"].flatten().tolist(),
        "model.who.weight": [3],
        again: [len(found[again])],
    }
    return [{"send": folder, "pieces": 1, "more": {name: size}, "refused": True} for name, size in more.items()]


# What may be sent by itself: a layer, the head or experts.
PARTS, BIAS = (r"(layers|h)\.0\.", r"lm_head\.", r"\.experts\."), r"\.bias$"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_answers_as_one_that_was_started_with_its_weights(family, tmp_path):
    """Whatever it is told to load over HTTP: files, others' updates in pieces, in parts, and what it must refuse."""
    first, second = (str(FAMILIES[family](tmp_path / str(seed), seed)) for seed in (1, 2))
    for folder in (first, second):
        tiny.add_tokenizer(folder)
    refused, names = broken(second), [name for name, _ in tensors(second)]
    has_biases = any(re.search(BIAS, name) for name in names)
    parts = [part for part in PARTS if any(re.search(part, name) for name in names)]
    norm = "ln_mlp.weight" if family == "rearranged rows" else "layernorm.weight"
    # What is loaded, and the folder whose weights a server has then. It is not asked where it has none, or of two.
    with_files = [
        ({"reload": first}, first),
        ({"reload": second}, None),
        ({"reload": first}, None),
        ({"reload": second}, second),
        (stored_otherwise(first), second),
        ({"send": first, "pieces": 3, "broken": norm, "refused": True}, second),
        ({"send": first, "pieces": 2, "left": True}, second),
        ({"send": first, "pieces": 2, "shuffled": True}, first),
        *[({"send": second, "pieces": 1, "part": BIAS, "refused": True}, first)] * has_biases,
        (refused, first),
        (refused, first),
        ({"send": first, "pieces": 2, "proofs": second, "refused": True}, first),
        ({"send": second, "pieces": 2, "proofs": second}, second),
        ({"send": first, "pieces": 1}, first),
        *[(step, first) for step in refused_names(second)],
        *[
            step
            for part, folder in zip(parts, (second, first, second))
            for step in (
                ({"send": folder, "pieces": 1, "part": part}, None),
                ({"send": folder, "pieces": 2, "part": f"^(?!.*{part})"}, folder),
            )
        ],
    ]
    with_dummies = [
        ({"send": second, "pieces": 1, "part": PARTS[0], "refused": True}, None),
        ({"send": second, "pieces": 3}, second),
        ({"reload": first, "refused": True}, second),  # vLLM has no loader of files then
    ]
    # In bfloat16 vLLM packs convolutions, too, and its kernel for int8 is in use.
    engine = {"dtype": "bfloat16" if family in ("Mamba-2", "dense linears in int8") else "float32", "max_num_seqs": 1}
    engine |= LATENT_ATTENTION if family == "latent attention" else {}
    jobs = [
        job_of(first, {"engine": engine | start, "call": "serve",
                       "loads": [step | {"unasked": serves is None} for step, serves in steps]})
        for start, steps in (({}, with_files), ({"load_format": "dummy"}, with_dummies))
    ]  # fmt: skip
    answers, of_dummies, other = generate(tmp_path / "run", [*jobs, job_of(second, {"engine": engine})])
    assert "error" not in answers and "error" not in of_dummies, (answers, of_dummies)
    keys = ("prompt", "tokens", "logprobs")
    fresh = {first: answers.pop(0), second: [{key: one[key] for key in keys} for one in other]}
    assert all(torch.tensor(a["prompt"]).ne(torch.tensor(b["prompt"])).any() for a, b in zip(*fresh.values()))
    for (step, serves), got in zip([*with_files, *with_dummies], [*answers, *of_dummies], strict=True):
        assert serves is None or got == fresh[serves], step
    taken = [step for step, _ in (*with_files, *with_dummies) if not (step.get("refused") or step.get("left"))]
    log = (tmp_path / "run" / "log").read_text()
    proved = re.findall(r"(\d+) matrices compute what the checkpoint says \([\d.]+ s(.*)\)", log)
    for step, found in zip([{"reload": first}, *taken, {"reload": second}], proved, strict=True):
        assert found == proved[0] if "reload" in step or "proofs" in step else found[0] == "0", (step, found)


def test_a_server_does_not_start_with_weights_that_were_not_written_so(tmp_path):
    """Rows of a pruned linear in another order, and rows of the embedding that are others."""
    folder, down = plain("qwen2")(tmp_path / "out", 1), "model.layers.1.mlp.down_proj"
    embedding = broken(folder)["reload"]
    rewrite(
        folder / "model.safetensors",
        lambda found: found.update({f"{down}.compressed": found[f"{down}.compressed"].roll(1, 0)}),
    )
    folders = {str(folder): down, embedding: "model.embed_tokens"}
    results = generate(tmp_path / "run", [job_of(one, {}) for one in folders])
    for (one, name), result in zip(folders.items(), results, strict=True):
        error = rf"RiaError: {one}: {name} \(.*\): \d+ of its \d+ rows are not what the checkpoint says"
        assert re.match(error, result["error"]), result


def test_what_one_rank_refuses_no_rank_serves(tmp_path):
    """The other rank has all of its new weights by then, and may never be told that nothing follows."""
    write = plain("qwen2")
    first, second = (str(write(tmp_path / str(seed), seed)) for seed in (1, 2))
    wrong = {"send": second, "pieces": 2, "broken": "norm.weight", "rank": 1}
    sequences = {
        "files": ([({"reload": broken(second)["reload"]}, True), ({"reload": second}, False)], 1),
        "refused": ([(wrong, True)], 0),
        "left": ([(wrong | {"left": True}, True)], 0),
        "sent again": ([(wrong, True), ({"send": second, "pieces": 3}, False)], 1),
    }
    jobs = [job_of(folder, {"engine": TWO_RANKS}) for folder in (first, second)]
    jobs += [job_of(first, {"engine": TWO_RANKS, "loads": steps}) for steps, _ in sequences.values()]
    results = generate(tmp_path / "run", jobs, **ONE_THREAD_EACH)
    for (name, (_, end)), got in zip(sequences.items(), results[2:], strict=True):
        assert "error" not in got, (name, got)
        answers = [[(r["tokens"], r["prompt"]) for r in one] for one in (got, results[end], results[1 - end])]
        assert answers[0] == answers[1] != answers[2], name

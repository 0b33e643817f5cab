"""Whole runs: what stays of a folder, what becomes better, what is said and what is refused."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from compressing import WarningRecorder, edit_config, edit_weights, run_small
from distilling import run

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.written import from_model
from ria_vllm.offline.distill.recipe import TEXT_SEED, Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.distill.text import training_text
from ria_vllm.offline.distill.train import Training
from ria_vllm.offline.evaluation.evaluate import perplexity, read_tokens
from ria_vllm.offline.model.run.hf import load_model, load_tokenizer
from ria_vllm.progress import Monitor

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", ["float", "int4-g32"])
def test_masks_permutations_and_format_stay_and_kept_weights_move(weights, pruned, text, tmp_path):
    dense, folder = pruned(weights=weights)
    run(dense, folder, tmp_path / "out", text, lr=2e-2 if weights == "int4-g32" else 1e-3)
    before, after = Reader(folder), Reader(tmp_path / "out")
    assert list(after.problems()) == []
    assert after.sparse_names == before.sparse_names and set(after.files) == set(before.files)
    same = "permutations.safetensors"
    assert (tmp_path / "out" / same).read_bytes() == (folder / same).read_bytes()
    changed = 0
    for name in before.files:
        equal = torch.equal(before.tensor(name), after.tensor(name))
        part = name.rpartition(".")[2]
        if part in ("bitmask", "shape") or name in before.dense_names:
            assert equal, name
        elif part == "weight_scale":
            assert not equal, name
        changed += not equal
    assert changed >= len(before.sparse_names)
    schema, old = (reader.config["quantization_config"] for reader in (after, before))
    own = {"recipe": None, "weights_digest": None, "proofs": None}
    assert schema | own == old | own and schema["weights_digest"] != old["weights_digest"]
    assert {key: value for key, value in schema["recipe"].items() if key != "distill"} == old["recipe"]
    (story,) = schema["recipe"]["distill"]
    assert story["teacher"] == "dense" and story["tokens"] == 1024 and story["text"] == text.name
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert "## Recovery" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_float16_is_computed_in_bfloat16_and_loses_no_bits(make_model, text, tmp_path):
    """What does not move keeps its bytes, though bfloat16 holds fewer."""
    dense, folder = make_model(tmp_path / "dense", "llama-mha", dtype=torch.float16), tmp_path / "pruned"
    run_small(dense, folder, text)
    run(dense, folder, tmp_path / "still", text, lr=0.0, tokens=128, compute_dtype="bfloat16")
    before, still = Reader(folder), Reader(tmp_path / "still")
    assert set(still.files) == set(before.files)
    for name in before.files:
        assert torch.equal(still.tensor(name).view(torch.uint8), before.tensor(name).view(torch.uint8)), name
    more = {"eval_text": (str(text),), "eval_tokens": 256, "evals": 1, "compute_dtype": "bfloat16", "lr": 3e-3}
    report = run(dense, folder, tmp_path / "out", text, **more)
    after = Reader(tmp_path / "out")
    assert {after.linear(name).dtype for name in after.sparse_names} == {torch.float16}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rounded = before.tensor(name).bfloat16().to(torch.float16)
        assert torch.equal(before.tensor(name), after.tensor(name)) and not torch.equal(rounded, after.tensor(name))
    assert all(before.tensor(name).dtype == after.tensor(name).dtype for name in before.files)
    assert report["recipe"]["distill"][0]["compute_dtype"] == "bfloat16"
    first, *_, last = report["distill"][0]["curve"]
    assert last["held_out"][text.name]["kl"] < 0.9 * first["held_out"][text.name]["kl"]


def test_a_folder_does_not_teach_itself(pruned, text, tmp_path):
    _, folder = pruned()
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(RiaError, match="the same weights as"):
        run(copy, folder, tmp_path / "out", text)


def test_it_comes_closer_to_the_teacher_on_other_text(pruned, text, tmp_path):
    """By the divergence that transformers' own logits of both folders give, which is what the curve says."""
    dense, folder = pruned(reconstruct="none")
    other, words = tmp_path / "other.txt", "Judge my vow: five dozen quartz sphinxes of black pack liquor jugs.".split()
    other.write_text(" ".join(random.Random(0).choices(words, k=400)))
    tokens = read_tokens(str(folder), other, 512).view(4, 128)

    @torch.no_grad()
    def distance(path: Path) -> float:
        logs, mine = (load_model(str(one), CPU)(input_ids=tokens).logits.log_softmax(-1) for one in (dense, path))
        return float((logs.exp() * (logs - mine)).sum(-1).mean())

    more = {"tokens": 64 * 64, "eval_text": (str(other), str(text)), "eval_tokens": 512, "lr": 1e-3}
    report = run(dense, folder, tmp_path / "out", text, **more)
    curve = {point["step"]: point["held_out"] for point in report["distill"][0]["curve"]}
    assert list(curve) == [0, 8, 16, 24, 32]
    kept = report["recipe"]["distill"][0]["kept_step"]
    assert curve[0][other.name]["kl"] == pytest.approx(distance(folder), rel=1e-4)
    assert curve[kept][other.name]["kl"] == pytest.approx(distance(tmp_path / "out"), rel=1e-4)
    for name, most in ((text.name, 0.5), (other.name, 0.7)):
        assert curve[kept][name]["kl"] < most * curve[0][name]["kl"]


def test_the_curve_says_what_eval_measures(pruned, text, tmp_path):
    dense, folder = pruned()
    report = run(dense, folder, tmp_path / "out", text, eval_text=(str(text),), eval_tokens=512)
    point = next(p for p in report["distill"][0]["curve"] if p["step"] == report["recipe"]["distill"][0]["kept_step"])
    tokens = read_tokens(str(folder), text, 512)
    own, teachers = (perplexity(load_model(str(one), CPU), tokens, 128).perplexity for one in (tmp_path / "out", dense))
    assert point["held_out"][text.name]["perplexity"] == pytest.approx(own, rel=1e-5)
    assert point["held_out"][text.name]["perplexity_dense"] == pytest.approx(teachers, rel=1e-5)
    # Card and report begin with that; size and speed are those of before.
    before, said = json.loads((folder / "ria_report.json").read_text())["verdict"], report["verdict"]
    assert next(iter(report)) == "verdict" and list(said) == list(before)
    assert f"perplexity {own:.2f}, dense {teachers:.2f}, before" in said["quality"]
    assert said["size"] == before["size"] and said["quality"] != before["quality"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- {said[key]}" in card for key in ("quality", "size")) and before["quality"] not in card


def test_the_curve_holds_the_means_of_what_is_trained_on(pruned, text, tmp_path):
    """With a learning rate of 0, over all of the text."""
    dense, folder = pruned()
    report = run(dense, folder, tmp_path / "out", text, lr=0.0, evals=1)
    recipe = Distillation(tokens=16 * 64, seq_len=64, text=str(text))
    windows = training_text(recipe, load_tokenizer(str(folder)), Monitor(shown=False))[0].long()
    with torch.no_grad():
        p, q = (load_model(str(path), CPU)(input_ids=windows).logits.log_softmax(-1) for path in (dense, folder))
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    following = windows[:, 1:, None]
    teachers, own = (float((-one[:, :-1].gather(-1, following)).mean().exp()) for one in (p, q))
    point = {"kl": wanted, "perplexity": own, "perplexity_dense": teachers}
    last = report["distill"][0]["curve"][-1]
    assert {key: last[key] for key in point} == pytest.approx(point, rel=1e-4)
    said = f"perplexity {own:.2f}, dense {teachers:.2f}; KL {wanted:.3f}"
    assert report["verdict"]["quality"] == f"on the last 1024 tokens, before they were trained on: {said}"


def test_training_that_never_gets_better_than_the_start_is_said_and_not_kept(pruned, text, tmp_path, monkeypatch):
    """The loss rises in the first step, and falls after that."""
    dense, folder = pruned()
    scores = iter([1.0, 3.0, 2.5, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0])
    monkeypatch.setattr(
        Training, "_scores", lambda _: {text.name: {"perplexity": 9.0, "perplexity_dense": 4.0, "kl": next(scores)}}
    )
    monitor, more = WarningRecorder(), {"eval_text": (str(text),), "eval_tokens": 128}
    report = run(dense, folder, tmp_path / "out", text, monitor=monitor, **more, evals=8)
    story = report["recipe"]["distill"][0]
    assert story["steps"] == 8 and story["kept_step"] == 0
    (warning,) = [line for line in monitor.warnings if "weights from before training" in line]
    assert text.name in warning and "--lr" in warning
    for name in Reader(folder).files:
        assert torch.equal(Reader(folder).tensor(name), Reader(tmp_path / "out").tensor(name))


def test_by_default_it_trains_on_text_that_the_teacher_writes(pruned, text, tmp_path, monkeypatch):
    """With the seed of its own for text, at temperature 1: what the teacher's sampling function gives."""
    dense, folder = pruned()
    trained_on = []
    monkeypatch.setattr(Training, "_step", lambda self, number: trained_on.append(self.windows) or (0.0, 0.0, 0.0))
    recipe = Distillation(tokens=16 * 64, seq_len=64, batch=2)
    assert recipe.text == "self"
    distill(folder, str(dense), tmp_path / "out", recipe, Settings(), Monitor(shown=False))
    teacher = load_model(str(dense), CPU)
    bos, seed = teacher.config.bos_token_id, recipe.seed + TEXT_SEED
    written = from_model(teacher, bos, recipe.windows, 64, seed, Monitor(shown=False))
    assert written.shape == (16, 64) and len(trained_on) == recipe.steps == 8
    assert all(torch.equal(windows.long(), written) for windows in trained_on)
    # It is the teacher's: one that the student had written would be other text.
    student = from_model(load_model(str(folder), CPU), bos, recipe.windows, 64, seed, Monitor(shown=False))
    assert not torch.equal(student, written)


def test_a_teacher_with_other_tokens_is_refused(pruned, text, tmp_path):
    dense, folder = pruned()
    other = Path(shutil.copytree(dense, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RiaError, match="other tokens"):
        run(other, folder, tmp_path / "out", text)
    assert not (tmp_path / "out.partial").exists()


def test_sequences_are_no_longer_than_the_models_context(pruned, text, tmp_path):
    """Of the teacher, or of the student, whichever is shorter."""
    dense, folder = pruned()
    short = Path(shutil.copytree(dense, tmp_path / "short"))
    edit_config(short, max_position_embeddings=48)
    monitor = WarningRecorder()
    recipe = Distillation(tokens=512, seq_len=64, text=str(text))
    report = distill(folder, str(short), tmp_path / "out", recipe, Settings(), monitor)
    assert report["recipe"]["distill"][0]["seq_len"] == 48
    assert any("48 tokens" in warning for warning in monitor.warnings)


def test_a_teacher_that_computes_nan_is_not_taken_for_training_that_diverges(pruned, text, tmp_path):
    dense, folder = pruned()
    broken = Path(shutil.copytree(dense, tmp_path / "broken"))
    edit_weights(broken, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] * torch.nan})
    with pytest.raises(RiaError, match="the teacher itself computes NaN"):
        run(broken, folder, tmp_path / "out", text)

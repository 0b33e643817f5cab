"""What a run says of itself: in the recipe, in the log, and under which names it measures."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressing import WarningRecorder, weight_digests
from compressing import digests as files_of
from distilling import stop_at
from hub_texts import NEW, OLD, install
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ria_vllm.cli import group
from ria_vllm.offline.distill.loss import Loss
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.evaluation.evaluate import read_tokens
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.progress import Monitor

K = 8


def run(dense: Path, folder: Path, out: Path, text: Path, monitor: Monitor, resume: bool = False, **options) -> dict:
    fixed = {"tokens": 256, "seq_len": 64, "text": str(text), "eval_text": (str(text),), "eval_tokens": 256, "evals": 1}
    return distill(folder, str(dense), out, Distillation(**fixed | options), Settings(resume=resume), monitor)


def divergences(dense: Path, folder: Path, text: Path) -> tuple[float, float]:
    """Between the predictions of transformers' models, in float64: over the whole vocabulary, and over the K most
    probable tokens and all others as one."""
    tokens = read_tokens(str(folder), text, 256).view(2, 128)
    with torch.no_grad():
        p, q = (load_model(str(path), torch.device("cpu"))(input_ids=tokens).logits for path in (dense, folder))
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    top = p.topk(K).indices
    parts = []
    for one in (p, q):
        found = one.gather(-1, top)
        parts.append(torch.cat([found, 1 - found.sum(-1, keepdim=True)], -1))
    return tuple(float((a * (a / b).log()).sum(-1).mean()) for a, b in ((p, q), parts))


@pytest.mark.parametrize("cached", [False, True])
def test_a_held_out_divergence_is_named_after_what_it_compares(cached, pruned, text, tmp_path):
    """Not by the option --top-k, but by what is left of the teacher's predictions: a cache holds the top k only."""
    dense, folder = pruned()
    monitor = WarningRecorder()
    report = run(dense, folder, tmp_path / "out", text, monitor, cache_teacher=cached, loss=Loss(top_k=K))
    score = report["distill"][0]["curve"][0]["held_out"][text.name]
    whole, top = divergences(dense, folder, text)
    assert top < 0.99 * whole
    name, wanted, words = ("kl_top_k", top, f"KL of the top {K}") if cached else ("kl", whole, "KL")
    assert set(score) == {"perplexity", name} and score[name] == pytest.approx(wanted, rel=1e-4)
    first = next(line for line in monitor.said if line.startswith("step 0 of"))
    assert first.endswith(f", {words} {score[name]:.4f}")


def test_the_recipe_says_what_rounds_the_weights(pruned, text, tmp_path):
    dense, folder = pruned()
    (story,) = run(dense, folder, tmp_path / "out", text, Monitor(shown=False))["recipe"]["distill"]
    found = {key: story[key] for key in ("processes", "shard", "device", "hardware", "threads")}
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    assert found == {"processes": 1, "shard": False, "device": "cpu", "hardware": capability, "threads": threads}


FIELDS = {"text_sha256", "eval_text_sha256", "student_weights_digest", "teacher_weights_digest"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_weights(folder: Path) -> str:
    """Of a folder with one weight file, as docs/format.md has it."""
    tensors = load_file(folder / "model.safetensors")
    data = {name: tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return hashlib.sha256(b"".join(name.encode() + b"\0" + data[name][:65536] for name in sorted(data))).hexdigest()


def check_shown(out: Path, text: Path, curve: list[dict]) -> None:
    """Every command reads a folder whose recipe has digests, the card shows them, and the curve has two points."""
    assert f"| text_sha256 | `{sha256(text)}` |" in (out / "README.md").read_text()
    commands = (["verify", str(out)], ["inspect", str(out), "--json"])
    done = [CliRunner().invoke(group, arguments, catch_exceptions=False) for arguments in commands]
    assert [one.exit_code for one in done] == [0, 0]
    assert [point["tokens"] for point in curve] == [0, 256]
    assert all({"perplexity", "kl"} <= set(point["held_out"][text.name]) for point in curve) and "kl" in curve[-1]
    assert json.loads(done[-1].output)["recipe"]["distill"][0]["text_sha256"] == sha256(text)


def test_the_recipe_has_digests_of_local_files(pruned, text, tmp_path):
    dense, folder = pruned()
    other = tmp_path / "other" / text.name
    other.parent.mkdir()
    other.write_text(text.read_text() + "z")
    second = tmp_path / "second.txt"
    second.write_text("words " * 400)
    held_out = {"eval_text": (str(text), str(second))}
    report = run(dense, folder, tmp_path / "out", text, Monitor(shown=False), **held_out)
    (story,) = report["recipe"]["distill"]
    assert {name: story[name] for name in FIELDS} == {
        "text_sha256": sha256(text),
        "eval_text_sha256": [sha256(text), sha256(second)],
        "student_weights_digest": of_weights(folder),
        "teacher_weights_digest": of_weights(dense),
    }
    check_shown(tmp_path / "out", text, report["distill"][0]["curve"])
    # Another text of the same name, and another student; the teacher and the held-out text are the same.
    (_, later) = run(dense, tmp_path / "out", tmp_path / "later", other, Monitor(shown=False))["recipe"]["distill"]
    assert (later["text"], later["teacher"]) == (story["text"], story["teacher"])
    assert later["text_sha256"] == sha256(other) != story["text_sha256"]
    assert later["student_weights_digest"] == of_weights(tmp_path / "out") != story["student_weights_digest"]
    assert later["teacher_weights_digest"] == story["teacher_weights_digest"]


def test_text_that_the_teacher_writes_has_no_digest(pruned, text, tmp_path):
    dense, folder = pruned()
    report = run(dense, folder, tmp_path / "out", Path("self"), Monitor(shown=False), eval_text=())
    assert FIELDS & report["recipe"]["distill"][0].keys() == {"student_weights_digest", "teacher_weights_digest"}


def test_a_streamed_data_set_is_read_as_far_as_needed_and_has_its_commit(pruned, tmp_path, monkeypatch):
    """A run that is resumed goes on with the text that it has begun with, whatever has become of the data set."""
    dense, folder = pruned()
    rows = [hashlib.sha256(bytes(divmod(i, 256))).hexdigest() for i in range(2000)]
    hub = install(monkeypatch, **{OLD: rows, NEW: rows[::-1]})
    fixed = {"monitor": Monitor(shown=False), "eval_text": (), "batch": 1}
    (story,) = run(dense, folder, tmp_path / "whole", Path("c4"), **fixed)["recipe"]["distill"]
    assert (story["text"], story["text_revision"], "text_sha256" in story) == ("c4", OLD, False)
    assert f"| text_revision | `{OLD}` |" in (tmp_path / "whole" / "README.md").read_text()
    assert 8 * 256 // 66 < hub.read < 100  # 8 times as many tokens as are asked for; a row has 66
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2)
        run(dense, folder, tmp_path / "out", Path("c4"), **fixed)
    hub.now = NEW
    run(dense, folder, tmp_path / "out", Path("c4"), resume=True, **fixed)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    run(dense, folder, tmp_path / "file", tmp_path / "rows.jsonl", **fixed)
    assert weight_digests(tmp_path / "file") == weight_digests(tmp_path / "whole")


def test_an_interrupted_run_is_recognised_without_digests(pruned, text, tmp_path, monkeypatch):
    """As an earlier version has begun it. Its text had no digest when it was read, and gets none."""
    dense, folder = pruned()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("ria_vllm.offline.distill.train.Training._step", lambda *_: 1 / 0)
        run(dense, folder, tmp_path / "out", text, Monitor(shown=False))
    assert not FIELDS & json.loads((tmp_path / "out.partial" / "run.json").read_text()).keys()
    kept = tmp_path / "out.partial" / "units" / "text.safetensors"
    with safe_open(kept, "pt") as file:
        assert json.loads(file.metadata()["record"]) == {"text_sha256": sha256(text)}
    save_file(load_file(kept), kept, {"record": "{}"})
    (story,) = run(dense, folder, tmp_path / "out", text, Monitor(shown=False), resume=True)["recipe"]["distill"]
    assert FIELDS - story.keys() == {"text_sha256"}

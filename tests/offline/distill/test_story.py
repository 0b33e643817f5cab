"""What a run says of itself: in the recipe, in the log, and under which names it measures."""

import hashlib
import json
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ria_vllm.cli import group
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.progress import Monitor


def run(dense: Path, folder: Path, out: Path, text: Path, monitor: Monitor, resume: bool = False, **options) -> dict:
    fixed = {"tokens": 256, "seq_len": 64, "text": str(text), "eval_text": (str(text),), "eval_tokens": 256, "evals": 1}
    return distill(folder, str(dense), out, Distillation(**fixed | options), Settings(resume=resume), monitor)


FIELDS = {"text_sha256", "eval_text_sha256", "student_weights_digest", "teacher_weights_digest"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_weights(folder: Path) -> str:
    """Of a folder with one weight file, as docs/reference.md has it."""
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

"""`--effort best` is `compress` and then `distill`: the same bytes, at once or in several runs."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from compressing import digests
from families import config_of, save_tokenizer
from recovered import save_recovered
from transformers import AutoModel, AutoModelForSequenceClassification

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.commands import compress
from ria_vllm.offline.distill import best
from ria_vllm.offline.distill.command import distill
from ria_vllm.offline.run import budget
from ria_vllm.offline.run.budget import Choice

TOKENS = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(best.forecast, "DISTILLED", TOKENS)


def invoke(command, *arguments: object):
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.fixture
def options(tiny, text) -> list[object]:
    return [tiny("llama"), "--data", text, "--samples", 2, "--seq-len", 32, "--effort", "best"]


def test_it_prunes_and_distils(options, text, tmp_path):
    done = invoke(compress, *options, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert re.search(r"this takes about \d+ s \(pruning \d+ s, distilling \d+ s\)", done.stderr)
    apart = [*options[:-1], "default", "--reconstruct", "block", "-o", tmp_path / "pruned"]
    hint = invoke(compress, *apart).stderr
    trained = ["--teacher", options[0], "--data", text, "--self-written", 0.5, "--tokens", TOKENS]
    trained += ["--compute-dtype", Reader(tmp_path / "pruned").schema.recipe["compute_dtype"]]
    assert invoke(distill, tmp_path / "pruned", "-o", tmp_path / "twice", *trained).exit_code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "twice")
    said = "".join(done.stderr.splitlines(keepends=True)[-5:])
    report = json.loads((tmp_path / "out" / "ria_report.json").read_text())
    assert {"quality", "size", "advice"} <= report["verdict"].keys() and "next" not in said
    assert re.search(r"perplexity \d+\.\d\d, dense \d+\.\d\d; KL \d\.\d{3}$", report["verdict"]["quality"])
    assert "\n".join(report["verdict"].values()) in said
    saved = [options[0], "--data", text, "--recipe", tmp_path / "out" / "ria_report.json"]
    repeated = invoke(compress, *saved, "-o", tmp_path / "again")
    assert repeated.exit_code == 0 and "not repeated" not in repeated.stderr
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    # The first half alone names the second.
    (line,) = (line for line in hint.splitlines() if line.startswith("next"))
    program, command, *words = shlex.split(line.partition(": ")[2])
    asked = distill.make_context(command, words).params
    assert program == "ria-vllm" and asked["folder"] == tmp_path / "pruned" and asked["teacher"] == str(options[0])
    assert asked["text"] == str(text) and asked["self_written"] == 0.5


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"teacher": "another"}, {"eval_text": ["a.txt"]}, "twice", "none"])
def test_a_training_of_other_options_is_not_repeated(change, options, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("ria_vllm.offline.run.compress.compress", lambda *_: {"linears": {}, "verdict": {}})
    monkeypatch.setattr(best, "prune_and_distill", lambda *arguments: runs.append(arguments[3]) or {})
    how = {"tokens": TOKENS, "text": options[2].name, "self_written": 0.5, "seq_len": 48, "batch": 2, "lr": 3e-4}
    how |= {"eval_text": [], "eval_tokens": 8192, "evals": 10, "compute_dtype": "bfloat16", "seed": 7}
    run = how | {"teacher": "dense", "steps": 42}
    changed = [run] * 2 if change == "twice" else "none" if change == "none" else [run | change]
    report = tmp_path / "report.json"

    def repeat(distilled: object, *more: object) -> str:
        recipe = {"pattern": "2:4", "scheme": "BF16", "calibration": options[2].name, "seed": 7, "source": "dense"}
        report.write_text(json.dumps({"recipe": recipe | {"distill": distilled}}))
        words = [options[0], "--data", options[2], "-o", tmp_path / "out", "--recipe", report, *more]
        return invoke(compress, *words).stderr

    assert "not repeated" in repeat(changed) and "not repeated" in repeat([run], "--effort", "default") and not runs
    repeat([run])
    repeat([run], "--seed", 8)
    repeat([run], "--compute-dtype", "float32")
    said = how | {"text": str(options[2])}
    wanted = [said, said | {"seed": 8}, said | {"compute_dtype": "float32"}]
    assert [one.model_dump(mode="json") for one in runs] == wanted


def test_interrupted_in_either_half_it_goes_on(options, tmp_path, monkeypatch):
    assert invoke(compress, *options, "-o", tmp_path / "whole").exit_code == 0
    wanted, out = digests(tmp_path / "whole"), tmp_path / "out"

    def interrupt(*_):
        raise KeyboardInterrupt

    for place in ("ria_vllm.offline.run.compress.say_layer", "ria_vllm.offline.distill.train.Training._step"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            stopped = invoke(compress, *options, "-o", out, "--resume")
        assert isinstance(stopped.exception, RiaError) and "--resume" in str(stopped.exception) and not out.exists()
    for option, value, was in (("--seed", 1, "seed (0)"), ("--rotate", "none", "rotate (heads)")):
        other = invoke(compress, *options, "-o", out, "--resume", option, value)
        assert f"out.pruned is from a run with another {was}" in str(other.exception)
    with monkeypatch.context() as patch:  # it does not prune again
        patch.setattr("ria_vllm.offline.run.layers.LayerPass.prune", interrupt)
        patch.setattr(best, "available", lambda _: 0)  # nor does it ask again whether there is room
        assert invoke(compress, *options, "-o", out, "--resume").exit_code == 0
        assert digests(out) == wanted and not (tmp_path / "out.pruned").exists()


def test_a_folder_of_that_name_and_too_little_text_are_refused_at_once(options, tmp_path, monkeypatch):
    monkeypatch.setattr(best, "compress", pytest.fail)
    mine = tmp_path / "out.pruned" / "mine"
    mine.mkdir(parents=True)
    result = invoke(compress, *options, "-o", tmp_path / "out", "--overwrite")
    assert "holds something else" in str(result.exception) and mine.exists()
    (tmp_path / "few.txt").write_text("words " * 99)
    (tmp_path / "fewer.txt").write_text("words " * 9)
    begun = tmp_path / "other.pruned.partial"  # by a run that nobody resumes
    begun.mkdir()
    (begun / "run.json").write_text("{")
    options[options.index("--data") + 1] = tmp_path / "few.txt"
    assert "too little text" in str(invoke(compress, *options, "-o", tmp_path / "other").exception)
    fewer = invoke(compress, *options, "--eval-data", tmp_path / "fewer.txt", "-o", tmp_path / "other").exception
    assert "54 tokens are too few" in str(fewer) and "or `distill` a smaller --eval-tokens" in str(fewer)
    assert {path.name for path in tmp_path.iterdir()} == {"out.pruned", "few.txt", "fewer.txt", begun.name}


def headless(folder: Path, auto: type) -> Path:
    auto.from_config(config_of("qwen3")).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_what_is_replaced_goes_last(options, tmp_path, monkeypatch):
    """Where nothing is pruned, and the disk fails in between, both folders are there."""
    nothing = Choice(frozenset(), {1: {"perplexity": 10.5, "perplexity_dense": 10.0}})
    monkeypatch.setattr(budget, "choose", lambda *_: nothing)
    options[1:1] = ["--scheme", "W8A8", "--max-loss", "900%", "--overwrite"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    replace = os.replace

    def failing(source, target):
        if Path(source).name == "out.pruned":
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    assert "the disk is gone" in str(invoke(compress, *options, "-o", tmp_path / "out").exception)
    assert (tmp_path / "out.replaced" / "old").exists() and (tmp_path / "out.pruned" / "config.json").exists()


@pytest.mark.parametrize("why", ["memory", "embeddings", "reranker", "recovered", "budget"])
def test_what_cannot_be_distilled_is_pruned_only_and_that_is_said(why, options, tmp_path, monkeypatch):
    said, hint = "it predicts no tokens", why == "memory"
    if why == "memory":
        monkeypatch.setattr(best, "available", lambda _: 10**8)
        said = r"that takes about 1 GB, and 0 GB of memory are free \(cpu\)"
    elif why == "budget":
        nothing = Choice(frozenset(), {1: {"perplexity": 10.5, "perplexity_dense": 10.0}})
        monkeypatch.setattr(budget, "choose", lambda *_: nothing)
        options[1:1] = ["--scheme", "W8A8", "--max-loss", "900%", "--overwrite"]
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").touch()
        said = "nothing in it is pruned"
    elif why == "recovered":
        options[0], said = save_recovered(tmp_path / "dense"), "it has linears that are 2:4 already"
    else:
        auto = AutoModel if why == "embeddings" else AutoModelForSequenceClassification
        options[0] = headless(tmp_path / "dense", auto)
    done = invoke(compress, *options, "-o", tmp_path / "out")
    assert done.exit_code == 0 and re.search(f"will not be distilled, because {said}", done.stderr)
    assert ("next, where both models fit" in done.stderr) == hint
    assert invoke(compress, *options[:-1], "default", "--reconstruct", "block", "-o", tmp_path / "plain").exit_code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")

"""Perplexity and divergence against their definitions in float64, and what stops a measurement."""

import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from server_stand_in import VOCABULARY, StandIn, serving

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.divergence import Listed, divergences
from ria_vllm.serve.benchmark.process import SupervisedProcess
from ria_vllm.serve.benchmark.quality import Incomparable, TextQuality

SEQ_LEN, WINDOWS = 32, 3


@pytest.fixture
def text(tmp_path):
    """Three windows and a bit, of one-byte characters."""
    path = tmp_path / "text.txt"
    generator = random.Random(0)
    path.write_text("".join(chr(generator.randrange(32, 127)) for _ in range(SEQ_LEN * WINDOWS + 5)))
    return path


def quality_of(text, top=VOCABULARY, seq_len=SEQ_LEN, max_tokens=10_000):
    return TextQuality(text, seq_len, max_tokens, top, "dense")


def measure(quality: TextQuality, **sides: StandIn):
    found = {}
    for name, side in sides.items():
        with serving(side) as server:
            quality.check(name, server)
            found[name] = quality.measure(name, server, Monitor(shown=False))
    return found


def rows_and_targets(text) -> tuple[torch.Tensor, torch.Tensor]:
    """Previous and predicted tokens, by definition: windows on their own, the incomplete one dropped."""
    windows = torch.tensor(list(text.read_bytes())[: SEQ_LEN * WINDOWS]).view(WINDOWS, SEQ_LEN)
    return windows[:, :-1].flatten(), windows[:, 1:].flatten()


def test_perplexity_and_divergence_over_the_whole_vocabulary(text):
    dense, sparse = StandIn(0), StandIn(1)
    found = measure(quality_of(text), dense=dense, sparse=sparse)
    rows, targets = rows_and_targets(text)
    for name, side in (("dense", dense), ("sparse", sparse)):
        logprobs = side.logprobs.double()[rows]
        expected = math.exp(-logprobs.gather(1, targets[:, None]).mean())
        assert found[name].perplexity == pytest.approx(expected, rel=1e-6)
        assert (found[name].tokens, found[name].windows) == (WINDOWS * (SEQ_LEN - 1), WINDOWS)
    p, q = dense.logprobs.double()[rows], sparse.logprobs.double()[rows]
    assert found["sparse"].kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-5)
    assert found["dense"].kl == 0 and found["dense"].unlisted is None and found["sparse"].unlisted < 1e-5


@pytest.mark.parametrize("top", [4, 16, 64])
def test_fewer_tokens_give_a_lower_bound(text, top):
    """Each position's lists are the `top` likeliest tokens and the text's own; test_divergence.py has the rest."""
    dense, sparse = StandIn(0, 3.0), StandIn(1, 2.0)
    sparse.logprobs = (dense.logprobs + sparse.logprobs).log_softmax(-1)
    found = measure(quality_of(text, top), dense=dense, sparse=sparse)["sparse"]
    lists, rests, full = ([], []), [], []
    for row, target in zip(*rows_and_targets(text)):
        distributions = [side.logprobs[row].double() for side in (dense, sparse)]
        for own, logprobs in zip(lists, distributions):
            likeliest = logprobs.topk(top)
            ids = sorted({*likeliest.indices.tolist(), int(target)})
            own.append(Listed(np.array(ids), logprobs[ids].numpy(), likeliest.values[-1].item(), 0.0))
        p, q = distributions
        both = list(set(lists[0][-1].ids) & set(lists[1][-1].ids))
        rests.append(1 - p[both].exp().sum().item())
        full.append((p.exp() * (p - q)).sum().item())
    assert found.kl == pytest.approx(divergences(*lists)[0].mean(), rel=1e-4)
    assert found.unlisted == pytest.approx(sum(rests) / len(rests), rel=1e-4)
    assert 0 < found.kl <= sum(full) / len(full)


def test_requests_hold_one_window_each(text):
    side = StandIn()
    measure(quality_of(text, top=7, max_tokens=2 * SEQ_LEN + 1), dense=side)
    tokens = list(text.read_bytes())
    asked = [content for path, content in side.requests if path == "/v1/completions"]
    assert [a["prompt"] for a in asked] == [tokens[:SEQ_LEN], tokens[SEQ_LEN : 2 * SEQ_LEN]]
    assert all(a["prompt_logprobs"] == 7 and a["max_tokens"] == 1 for a in asked)


def test_without_the_reference_there_is_no_divergence(text):
    found = measure(quality_of(text), sparse=StandIn())["sparse"]
    assert found.kl is None and found.unlisted is None and found.perplexity > 1


def test_other_tokens(text):
    with pytest.raises(Incomparable, match="other: splits .*text.txt into different tokens than dense.*not comparable"):
        measure(quality_of(text), dense=StandIn(), other=StandIn(shift=1))


def test_a_short_text(text):
    with pytest.raises(Incomparable, match="text.txt: 31 tokens are less than one window of 32"):
        measure(quality_of(text, max_tokens=31), dense=StandIn())


def test_a_window_that_does_not_fit(text):
    measure(quality_of(text, seq_len=63), dense=StandIn())
    with pytest.raises(Incomparable, match="dense: a window of 64 tokens.*context of 64"):
        measure(quality_of(text, seq_len=64), dense=StandIn())


def test_a_text_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("binary", "nowhere"):
        with pytest.raises(RiaError, match=f"--text .*{name}: not readable"):
            quality_of(tmp_path / name)


def test_the_text_is_utf8_in_any_locale(tmp_path):
    (tmp_path / "text").write_bytes("Größe: 3 µm".encode())
    code = (
        "import sys; from pathlib import Path\n"
        "from ria_vllm.serve.benchmark.quality import TextQuality\n"
        "TextQuality(Path(sys.argv[1]), 8, 8, 8, 'dense')\n"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [sys.executable, "-c", code, str(tmp_path / "text")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=os.environ | locale)
    assert done.returncode == 0, done.stderr


def spoil(answer, change):
    change(answer["choices"][0]["prompt_logprobs"])
    return 200, answer


@pytest.mark.parametrize(
    "change",
    [
        lambda positions: positions.pop(),
        lambda positions: positions[3].clear(),
        lambda positions: positions.__setitem__(3, None),
        lambda positions: [positions[3].pop(key) for key in list(positions[3])[:1]],
        lambda positions: [entry.update(logprob=0.5) for entry in positions[3].values()],
        lambda positions: [entry.update(logprob=float("nan")) for entry in positions[3].values()],
        lambda positions: [entry.update(logprob=None) for entry in positions[3].values()],
        lambda positions: positions[3].update(abc={"logprob": -1.0}),
    ],
    ids=["short", "empty", "null", "no target", "positive", "nan", "none", "no id"],
)
def test_an_unusable_answer(text, change):
    side = StandIn(sharpness=0.1)
    side.answer = lambda path, answer: spoil(answer, change) if path == "/v1/completions" else (200, answer)
    with pytest.raises(RiaError, match="dense: .* does not answer with the prompt's logprobs"):
        measure(quality_of(text, top=2), dense=side)


def test_a_refusal_is_quoted(text):
    side = StandIn()
    error = {"error": {"message": "Requested prompt logprobs of 7, which is greater than max allowed: 5"}}
    side.answer = lambda path, answer: (400, error) if path == "/v1/completions" else (200, answer)
    with pytest.raises(RiaError, match="dense: .*/v1/completions refused the request: Requested.*max allowed: 5"):
        measure(quality_of(text, top=7), dense=side)


def test_a_server_without_vllms_tokenize(text):
    side = StandIn()
    side.answer = lambda path, answer: (200, {"object": "error"})
    with pytest.raises(RiaError, match="dense: .*/tokenize does not answer like vLLM's"):
        measure(quality_of(text), dense=side)


def test_a_text_without_probability(text):
    """JSON has no infinity: vLLM writes -9999 for its negative."""
    side = StandIn()
    side.logprobs = torch.full_like(side.logprobs, -9999.0)
    side.logprobs[:, 0] = 0
    with pytest.raises(RiaError, match="dense: gives the text no probability"):
        measure(quality_of(text, top=2), dense=side)


def test_a_server_that_dies_is_named_with_its_log(text, tmp_path):
    quality, side = quality_of(text), StandIn()
    with serving(side) as server, SupervisedProcess(
        [sys.executable, "-c", "print('out of memory')"], tmp_path / "log"
    ) as process:  # fmt: skip
        process.wait(30)
        server = replace(server, process=process)
        quality.check("W8A8", server)
        side.answer = lambda *_: (200, None)
        with pytest.raises(RiaError, match="(?s)W8A8: the server ended.*log:.*out of memory"):
            quality.measure("W8A8", server, Monitor(shown=False))

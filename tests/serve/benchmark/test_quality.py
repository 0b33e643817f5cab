"""Perplexity and divergence against their definitions in float64, and what stops a measurement."""

import math
import random

import numpy as np
import pytest
import torch
from server_stand_in import VOCABULARY, StandIn, serving

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark import quality
from ria_vllm.serve.benchmark.quality import TextQuality

SEQ_LEN, WINDOWS = 32, 3


@pytest.fixture
def text(tmp_path):
    """Three windows and a bit, of one-byte characters."""
    path = tmp_path / "text.txt"
    generator = random.Random(0)
    path.write_text("".join(chr(generator.randrange(32, 127)) for _ in range(SEQ_LEN * WINDOWS + 5)))
    return path


def quality_of(text, seq_len=SEQ_LEN, max_tokens=10_000):
    return TextQuality(text, seq_len, max_tokens)


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
        assert found[name].tokens == WINDOWS * (SEQ_LEN - 1)
    p, q = dense.logprobs.double()[rows], sparse.logprobs.double()[rows]
    assert found["sparse"].kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-5)
    assert found["dense"].kl == found["dense"].unlisted == 0 and found["sparse"].unlisted < 1e-5


@pytest.mark.parametrize("top", [4, 64])
def test_fewer_tokens_give_a_lower_bound(text, top, monkeypatch):
    """Each position's lists are the `top` likeliest tokens and the text's own; the others are one token."""
    monkeypatch.setattr(quality, "TOP", top)
    dense, sparse = StandIn(0, 3.0), StandIn(1, 2.0)
    sparse.logprobs = (dense.logprobs + sparse.logprobs).log_softmax(-1)
    found = measure(quality_of(text), dense=dense, sparse=sparse)["sparse"]
    rests, merged, full = [], [], []
    for row, target in zip(*rows_and_targets(text)):
        p, q = (side.logprobs[row].double().exp() for side in (dense, sparse))
        both = [t for t in range(VOCABULARY) if all(t in {*x.topk(top).indices.tolist(), int(target)} for x in (p, q))]
        p_few, q_few = (torch.cat([x[both], 1 - x[both].sum(0, keepdim=True)]) for x in (p, q))
        rests.append(p_few[-1].item())
        merged.append((p_few * (p_few / q_few).log()).sum().item())
        full.append((p * (p / q).log()).sum().item())
    assert found.kl == pytest.approx(np.mean(merged), rel=1e-4)
    assert found.unlisted == pytest.approx(np.mean(rests), rel=1e-4)
    assert 0 < found.kl <= np.mean(full)


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
        lambda positions: positions[3].update(abc={"logprob": -1.0}),
    ],
    ids=["short", "empty", "null", "no target", "positive", "nan", "no id"],
)
def test_an_unusable_answer(text, change, monkeypatch):
    monkeypatch.setattr(quality, "TOP", 2)
    side = StandIn(sharpness=0.1)
    side.answer = lambda path, answer: spoil(answer, change) if path == "/v1/completions" else (200, answer)
    with pytest.raises(RiaError, match="dense: .*prompt's logprobs"):
        measure(quality_of(text), dense=side)


@pytest.mark.parametrize(
    ("answer", "said"), [((400, {"error": "more than max allowed: 5"}), "max allowed: 5"), ((200, None), "")]
)
def test_a_refusal_is_quoted_with_the_end_of_the_servers_log(text, answer, said):
    """And so is the log of a server that dies."""
    side = StandIn()
    side.answer = lambda path, usual: answer if path == "/v1/completions" else (200, usual)
    with pytest.raises(RiaError, match=f"(?s)dense: .*/v1/completions.*{said}.*The end of its log"):
        measure(quality_of(text), dense=side)


def test_a_text_without_probability(text):
    """JSON has no infinity: vLLM writes -9999 for its negative."""
    side = StandIn()
    side.logprobs = torch.full_like(side.logprobs, -9999.0)
    side.logprobs[:, 0] = 0
    with pytest.raises(RiaError, match="dense: gives the text no probability"):
        measure(quality_of(text), dense=side)

"""A model of the layout of Sparse-Llama-3.1-8B-2of4, compressed and served, against Hugging Face on the same folder."""

import pytest
import torch
from compare import check, differences, generate, job_of, prompts
from compressing import run_small
from families import TEXT
from recovered import save_recovered
from tiny import round_tokens
from transformers import AutoModelForCausalLM

from ria_vllm.format.pattern import SCHEMES

pytestmark = pytest.mark.slow

GIVEN = [[token % 256 for token in prompt] for prompt in prompts()]  # the model has few words


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Scheme -> (the compressed folder as transformers reads it, what vLLM generates from it)."""
    place = tmp_path_factory.mktemp("recovered")
    source, names, text = save_recovered(place / "in"), ("W4A16", "W4A8"), place / "words.txt"
    text.write_text(TEXT * 40)
    for name in names:
        report, _ = run_small(source, place / name, text, reconstruct="short", **SCHEMES[name])
        assert report["kept"]["linears"] == 14
    jobs = [job_of(place / name, {"prompts": GIVEN}) for name in names]
    results = generate(place / "run", jobs, RIA_VLLM_BACKEND="reference")
    models = [AutoModelForCausalLM.from_pretrained(place / name, dtype="float32").eval() for name in names]
    return dict(zip(names, zip(models, results, strict=True), strict=True))


def in_two_numbers(x: torch.Tensor) -> torch.Tensor:
    """As an int8 head reads its input: a rounded token, and what rounding it left, rounded likewise."""
    first = round_tokens(x)
    return first + round_tokens(x - first)


def test_integers(served):
    model, results = served["W4A16"]
    head = model.lm_head.register_forward_pre_hook(lambda _, read: (in_two_numbers(read[0]),))
    check(model, results, given=GIVEN)
    head.remove()


def test_rounded_inputs(served):
    """As in test_vllm.py, a difference in the last place may round a channel to the next integer."""
    off = differences(*served["W4A8"], given=GIVEN)
    assert off.median() < 1e-4 and off.mean() < 5e-3

"""benchmarks.answers, against transformers' own losses on each answer."""

import math

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import answers
from ria_vllm.offline.calibration.written import PROMPTS, Prompts


@pytest.fixture
def chat(tiny, tmp_path):
    """A folder with a chat template, and its model."""
    folder = tmp_path / "chat"
    tokenizer, model = AutoTokenizer.from_pretrained(tiny("llama")), AutoModelForCausalLM.from_pretrained(tiny("llama"))
    tokenizer.chat_template = "{{ messages[0].content }}>"
    model.generation_config.eos_token_id = [7, 9]
    model.generation_config.update(do_sample=True, repetition_penalty=1.5)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder, model.eval()


def test_answers_end_where_the_model_ends_them(chat):
    model, asked = chat[1], [[11, 12], [13, 14, 15, 16, 17], [21]]
    for sampled in (True, False):
        found = answers.answers(model, Prompts(asked, frozenset({7, 9})), sampled, 60, batch=2)
        assert all(1 <= len(one) <= 60 and not {7, 9} & set(one[:-1]) for one in found)
    for prompt, answer in zip(asked, found, strict=True):  # the likeliest, each prompt without padding
        for at, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer[:at]]])).logits[0, -1]
            assert int(logits.argmax()) == token
    assert answers.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5) and answers.repeated([1]) == 0


def test_only_answers_are_compared(chat):
    model, asked, answered = chat[1], [[11, 12], [13, 14, 15]], [[4, 5, 6], [8]]
    other = AutoModelForCausalLM.from_config(model.config).eval()
    pairs = zip(asked, answered, strict=True)
    found = answers.compared(model, other, [(torch.tensor(prompt + answer), len(prompt)) for prompt, answer in pairs])
    losses, divergences, same = [], [], []
    for prompt, answer in zip(asked, answered, strict=True):
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            out = [one(ids, labels=labels) for one in (model, other)]
        losses.append([float(one.loss) * len(answer) for one in out])
        p, q = (one.logits[0].double().softmax(-1) for one in out)
        for at in range(len(prompt) - 1, len(prompt) + len(answer) - 1):
            divergences.append(float((p[at] * (p[at] / q[at]).log()).sum()))
            same.append(int(p[at].argmax() == q[at].argmax()))
    dense, pruned = (math.exp(sum(column) / 4) for column in zip(*losses, strict=True))
    assert found["dense"] == pytest.approx(dense, rel=1e-5) and found["perplexity"] == pytest.approx(pruned, rel=1e-5)
    assert found["kl"] == pytest.approx(sum(divergences) / 4, rel=1e-4) and found["agreement"] == sum(same) / 4


def test_its_table(chat):
    folder = str(chat[0])
    done = CliRunner().invoke(answers.main, [folder, folder, "--prompts", "3", "--tokens", "5"])
    dense, same = done.output.splitlines()[-2:]
    assert dense == same and "| 0.000 | 100.0% |" in same
    assert not set(answers.PROMPTS.read_text().splitlines()) & set(PROMPTS.read_text().splitlines())

"""vLLM's pooling runner on pruned models: embeddings and classes are those of transformers on the pruned weights."""

from dataclasses import replace

import pytest
import tiny
import torch
from compare import generate, prompts
from transformers import AutoModel, AutoModelForSequenceClassification

pytestmark = pytest.mark.slow

BARE = {"block": "layers.{i}.", "auto": AutoModel}
CLASSIFIER = {"auto": AutoModelForSequenceClassification}
TWO_WAYS = {"classifier_from_token": ["a", "b"], "method": "from_2_way_softmax"}
RERANKER = {"architectures": ["Qwen3ForSequenceClassification"]} | TWO_WAYS
FAMILIES = tiny.FAMILIES
# Name of the run: (family, settings of the model, engine arguments)
EMBED = {
    "a causal model": (FAMILIES["qwen3"], {}, {"convert": "embed"}),
    "a causal model, int4-g64": (FAMILIES["llama-gqa"], {"weights": "int4-g64"}, {"convert": "embed"}),
    "Qwen3Model": (replace(FAMILIES["qwen3"], **BARE), {}, {}),
    "LlamaModel": (replace(FAMILIES["llama-gqa"], **BARE), {}, {}),
    "Gemma3TextModel": (replace(FAMILIES["gemma3"], **BARE), {"use_bidirectional_attention": True}, {}),
}
CLASSIFY = {
    "Qwen3ForSequenceClassification": (replace(FAMILIES["qwen3"], **CLASSIFIER), {"num_labels": 3}, {}),
    "Qwen3ForSequenceClassification, int8": (
        replace(FAMILIES["qwen3"], **CLASSIFIER),
        {"num_labels": 3, "weights": "int8"},
        {},
    ),
    "LlamaForSequenceClassification": (replace(FAMILIES["llama-gqa"], **CLASSIFIER), {"num_labels": 1}, {}),
    "a reranker that is a causal model": (FAMILIES["qwen3"], {}, {"hf_overrides": RERANKER}),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """All of them, one after the other in one process."""
    folder = tmp_path_factory.mktemp("pooling")
    models, jobs = {}, []
    for number, (name, (family, settings, engine)) in enumerate((EMBED | CLASSIFY).items()):
        place = folder / f"model{number}"
        models[name] = tiny.write(family, place, pad_token_id=0, **settings)
        tiny.add_tokenizer(place)
        jobs.append({
            "model": str(place), "prompts": prompts(), "call": "embed" if name in EMBED else "classify",
            "engine": {"dtype": "float32", "runner": "pooling", "skip_tokenizer_init": False} | engine,
        })  # fmt: skip
    results = generate(folder / "run", jobs)
    return {name: (models[name], result) for name, result in zip(models, results)}


@pytest.mark.parametrize("name", EMBED)
def test_embeddings(served, name):
    model, results = served[name]
    assert "error" not in results, results
    for prompt, embedding in zip(prompts(), results, strict=True):
        with torch.no_grad():
            last = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.tensor(embedding), last / last.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFY)
def test_classes(served, name):
    model, results = served[name]
    assert "error" not in results, results
    for prompt, probabilities in zip(prompts(), results, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0]
        if name.startswith("a reranker"):
            no, yes = (3 + letter_of(token) for token in "ab")
            want = logits[-1, [no, yes]].softmax(-1)[1:]
        else:
            want = logits.softmax(-1) if len(logits) > 1 else logits.sigmoid()
        torch.testing.assert_close(torch.tensor(probabilities), want, rtol=0, atol=1e-5)


def letter_of(token: str) -> int:
    """The place of a byte's token in the vocabulary that `tiny.add_tokenizer` writes, after three special ones."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(token)

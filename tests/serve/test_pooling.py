"""vLLM's pooling runner on pruned models: embeddings and classes are those of transformers on the pruned weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from compare import generate, prompts
from compressing import run_small
from families import TEXT
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.export import export_dense

pytestmark = pytest.mark.slow

QWEN, LLAMA, GEMMA = (tiny.FAMILIES[name] for name in ("qwen3", "llama-gqa", "gemma3"))
BARE = {"block": "layers.{i}.", "auto": AutoModel}
CLASSIFIER = {"auto": AutoModelForSequenceClassification}
TWO_WAYS = {"classifier_from_token": ["a", "b"], "method": "from_2_way_softmax"}
RERANKER = {"hf_overrides": {"architectures": ["Qwen3ForSequenceClassification"]} | TWO_WAYS}
ENGINE = {"dtype": "float32", "runner": "pooling", "skip_tokenizer_init": False}
# Name of the run: (family, settings of the model, engine arguments)
EMBED = {
    "a causal model, int4-g64": (LLAMA, {"weights": "int4-g64"}, {"convert": "embed"}),
    "LlamaModel": (replace(LLAMA, **BARE), {}, {}),
    "Gemma3TextModel": (replace(GEMMA, **BARE), {"use_bidirectional_attention": True}, {}),
}
CLASSIFY = {
    "three classes, int8": (replace(QWEN, **CLASSIFIER), {"num_labels": 3, "weights": "int8"}, {}),
    "one class": (replace(LLAMA, **CLASSIFIER), {"num_labels": 1}, {}),
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}. {% endfor %}?"
QUERY, DOCUMENTS = "Which fox is brown?", ["The quick one", "The sun", "None of the lazy dogs behind the hills"]
# The number of a byte's token in the vocabulary that `tiny.add_tokenizer` writes, after three special ones.
TOKEN_OF = {letter: 3 + i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
TOKEN_OF[" "] = TOKEN_OF["Ġ"]
NO, YES = TOKEN_OF["a"], TOKEN_OF["b"]
# What sentence-transformers puts behind a model, as in EmbeddingGemma: the mean over tokens, and two matrices.
MODULES = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Dense", "Dense"), ("4_Normalize", "")
INSIDE = 64


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Name of the run -> (transformers' model, vLLM's results), one after the other in one process."""
    folder = tmp_path_factory.mktemp("pooling")
    models, jobs = {}, []
    for number, (name, (family, settings, engine)) in enumerate((EMBED | CLASSIFY).items()):
        place = folder / f"model{number}"
        models[name] = tiny.write(family, place, pad_token_id=0, **settings)
        tiny.add_tokenizer(place)
        call = "embed" if name in EMBED else "classify"
        jobs.append({"model": str(place), "prompts": prompts(), "call": call, "engine": ENGINE | engine})
    models["EmbeddingGemma"] = compress_with_modules(folder / "gemma")
    jobs.append({"model": str(folder / "gemma/out"), "prompts": prompts(), "call": "embed", "engine": ENGINE})
    models["reranker"] = compress(folder / "reranker", tiny.model_of(QWEN, pad_token_id=0), QWEN.auto)
    jobs.append({
        "model": str(folder / "reranker/out"), "call": "score", "query": QUERY, "documents": DOCUMENTS,
        "template": TEMPLATE, "engine": ENGINE | RERANKER,
    })  # fmt: skip
    return {name: (models[name], result) for name, result in zip(models, generate(folder / "run", jobs), strict=True)}


def compress(place: Path, model: PreTrainedModel, auto: type) -> PreTrainedModel:
    """Compress a model to `place`/out; transformers' model on its export."""
    model.save_pretrained(place / "dense")
    tiny.add_tokenizer(place / "dense")
    (place / "text.txt").write_text(TEXT * 20)
    run_small(place / "dense", place / "out", place / "text.txt")
    export_dense(Reader(place / "out"), place / "export", 1 << 40)
    return auto.from_pretrained(place / "export", dtype=torch.float32).eval()


def compress_with_modules(place: Path) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """The same of an embedding model, and the matrices behind it."""
    dense = place / "dense"
    (dense / "1_Pooling").mkdir(parents=True)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind or path[2:]}"}
        for i, (path, kind) in enumerate(MODULES)
    ]
    (dense / "modules.json").write_text(json.dumps(modules))
    (dense / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": "cosine"}))
    pooling = {"word_embedding_dimension": tiny.HIDDEN, "pooling_mode_mean_tokens": True}
    (dense / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    matrices = [torch.randn(INSIDE, tiny.HIDDEN), torch.randn(tiny.HIDDEN, INSIDE)]
    for path, matrix in zip(("2_Dense", "3_Dense"), matrices):
        (dense / path).mkdir()
        shape = {"in_features": matrix.shape[1], "out_features": matrix.shape[0], "bias": False}
        activation = {"activation_function": "torch.nn.modules.linear.Identity"}
        (dense / path / "config.json").write_text(json.dumps(shape | activation))
        save_file({"linear.weight": matrix}, dense / path / "model.safetensors")
    model = tiny.model_of(replace(GEMMA, **BARE), use_bidirectional_attention=True)
    return compress(place, model, AutoModel), matrices


def last_states(model, prompt):
    """[tokens, hidden]"""
    with torch.no_grad():
        return model.base_model(torch.tensor([prompt])).last_hidden_state[0]


@pytest.mark.parametrize("name", [*EMBED, "EmbeddingGemma"])
def test_embeddings(served, name):
    model, results = served[name]
    assert "error" not in results, results
    for prompt, embedding in zip(prompts(), results, strict=True):
        if name in EMBED:
            want = last_states(model, prompt)[-1]
        else:
            bare, (first, second) = model
            want = second @ (first @ last_states(bare, prompt).mean(0))
        torch.testing.assert_close(torch.tensor(embedding), want / want.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFY)
def test_classes(served, name):
    model, results = served[name]
    assert "error" not in results, results
    for prompt, probabilities in zip(prompts(), results, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0]
        want = logits.softmax(-1) if len(logits) > 1 else logits.sigmoid()
        torch.testing.assert_close(torch.tensor(probabilities), want, rtol=0, atol=1e-5)


def test_scores_of_a_reranker_that_is_a_causal_model(served):
    model, scores = served["reranker"]
    assert "error" not in scores, scores
    for document, score in zip(DOCUMENTS, scores, strict=True):
        text = f"query: {QUERY}. document: {document}. ?"
        with torch.no_grad():
            logits = model(torch.tensor([[TOKEN_OF[letter] for letter in text]])).logits[0]
        torch.testing.assert_close(torch.tensor(score), logits[-1, [NO, YES]].softmax(-1)[1], rtol=0, atol=1e-5)
    assert max(scores) - min(scores) > 1e-3  # the documents count

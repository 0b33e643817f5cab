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

BARE = {"block": "layers.{i}.", "auto": AutoModel}
CLASSIFIER = {"auto": AutoModelForSequenceClassification}
TWO_WAYS = {"classifier_from_token": ["a", "b"], "method": "from_2_way_softmax"}
RERANKER = {"architectures": ["Qwen3ForSequenceClassification"]} | TWO_WAYS
ONE_WAY = {"classifier_from_token": ["b"], "method": "no_post_processing"}
GEMMA_RERANKER = {"architectures": ["GemmaForSequenceClassification"]} | ONE_WAY
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
    "a reranker that is a causal Gemma": (
        replace(FAMILIES["llama-mqa"], model_type="gemma", settings=(("tie_word_embeddings", True),)),
        {},
        {"hf_overrides": GEMMA_RERANKER},
    ),
}
# Reranking models that `compress` writes. Name of the run: (family, settings of the model, engine arguments, template)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}. {% endfor %}?"
SCORE = {
    "a reranker that is a causal model": (FAMILIES["qwen3"], {}, {"hf_overrides": RERANKER}, TEMPLATE),
    "LlamaForSequenceClassification": (replace(FAMILIES["llama-gqa"], **CLASSIFIER), {"num_labels": 1}, {}, None),
}
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
    name = "EmbeddingGemma"
    models[name] = compress_with_modules(folder / name)
    engine = {"dtype": "float32", "runner": "pooling", "skip_tokenizer_init": False}
    jobs.append({"model": str(folder / name / "out"), "prompts": prompts(), "call": "embed", "engine": engine})
    for number, (name, (family, settings, engine, template)) in enumerate(SCORE.items()):
        place = folder / f"score{number}"
        models[f"score: {name}"] = compress_reranker(family, place, **settings)
        jobs.append({
            "model": str(place / "out"), "call": "score", "query": QUERY, "documents": DOCUMENTS, "template": template,
            "engine": {"dtype": "float32", "runner": "pooling", "skip_tokenizer_init": False} | engine,
        })  # fmt: skip
    results = generate(folder / "run", jobs)
    return {name: (models[name], result) for name, result in zip(models, results)}


def compress(place: Path) -> Path:
    """`compress` `place`/dense to `place`/out; the folder of its export."""
    text = place / "text.txt"
    text.write_text(TEXT * 20)
    run_small(place / "dense", place / "out", text)
    export_dense(Reader(place / "out"), place / "export", 1 << 40)
    return place / "export"


def compress_reranker(family: tiny.Family, place: Path, **settings: object) -> PreTrainedModel:
    """`compress` a reranking model to `place`/out; transformers' model on its export."""
    dense = place / "dense"
    tiny.model_of(family, pad_token_id=0, **settings).save_pretrained(dense)
    tiny.add_tokenizer(dense)
    return family.auto.from_pretrained(compress(place), dtype=torch.float32).eval()


def compress_with_modules(place: Path) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """`compress` an embedding model to `place`/out; transformers' model on its export, and the matrices behind it."""
    dense = place / "dense"
    tiny.model_of(replace(FAMILIES["gemma3"], **BARE), use_bidirectional_attention=True).save_pretrained(dense)
    tiny.add_tokenizer(dense)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind or path[2:]}"}
        for i, (path, kind) in enumerate(MODULES)
    ]
    (dense / "modules.json").write_text(json.dumps(modules))
    (dense / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": "cosine"}))
    (dense / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": tiny.HIDDEN, "pooling_mode_mean_tokens": True}
    (dense / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    matrices = [torch.randn(INSIDE, tiny.HIDDEN), torch.randn(tiny.HIDDEN, INSIDE)]
    for path, matrix in zip(("2_Dense", "3_Dense"), matrices):
        (dense / path).mkdir()
        shape = {"in_features": matrix.shape[1], "out_features": matrix.shape[0], "bias": False}
        activation = {"activation_function": "torch.nn.modules.linear.Identity"}
        (dense / path / "config.json").write_text(json.dumps(shape | activation))
        save_file({"linear.weight": matrix}, dense / path / "model.safetensors")
    return AutoModel.from_pretrained(compress(place), dtype=torch.float32).eval(), matrices


def test_an_embedding_model_with_sentence_transformers_modules(served):
    (model, matrices), results = served["EmbeddingGemma"]
    assert "error" not in results, results
    for prompt, embedding in zip(prompts(), results, strict=True):
        with torch.no_grad():
            mean = model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        want = matrices[1] @ (matrices[0] @ mean)
        torch.testing.assert_close(torch.tensor(embedding), want / want.norm(), rtol=0, atol=1e-5)


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
            want = logits[-1, [YES]].sigmoid() if name.endswith("Gemma") else logits[-1, [NO, YES]].softmax(-1)[1:]
        else:
            want = logits.softmax(-1) if len(logits) > 1 else logits.sigmoid()
        torch.testing.assert_close(torch.tensor(probabilities), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCORE)
def test_scores(served, name):
    model, scores = served[f"score: {name}"]
    assert "error" not in scores, scores
    for document, score in zip(DOCUMENTS, scores, strict=True):
        text = f"query: {QUERY}. document: {document}. ?" if SCORE[name][3] else QUERY + document
        with torch.no_grad():
            logits = model(torch.tensor([[TOKEN_OF[letter] for letter in text]])).logits[0]
        want = logits[-1, [NO, YES]].softmax(-1)[1] if SCORE[name][3] else logits[0].sigmoid()
        torch.testing.assert_close(torch.tensor(score), want, rtol=0, atol=1e-5)
    assert max(scores) - min(scores) > 1e-3  # the documents count

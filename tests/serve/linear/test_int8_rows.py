"""Heads and embeddings in int8, as vLLM's layers serve them. The oracle is the formula, in float64."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding as embeddings
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.serve.linear.int8_rows import Int8EmbeddingMethod
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.int8_heads import match_heads

WORDS, WIDTH = 293, 128  # vLLM pads them to 320 words, 160 for each of two ranks
STORED = {
    "integers": torch.randint(-127, 128, (WORDS, WIDTH), generator=torch.Generator().manual_seed(1), dtype=torch.int8),
    "weight_scale": torch.rand(WORDS, 1, generator=torch.Generator().manual_seed(2)) + 0.01,
}
DENSE = STORED["integers"].double() * STORED["weight_scale"].double()
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture
def become(ranks, monkeypatch):
    """Call with (rank, size) to become that rank."""
    monkeypatch.setattr(embeddings, "tensor_model_parallel_all_reduce", lambda x: x)

    def change(rank, size):
        ranks(rank, size)
        monkeypatch.setattr(embeddings, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(embeddings, "get_tensor_model_parallel_world_size", lambda: size)

    change(0, 1)
    return change


class Model(torch.nn.Module):
    def __init__(self, tied, dtype):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(WORDS, WIDTH, params_dtype=dtype)
        self.lm_head = ParallelLMHead(WORDS, WIDTH, params_dtype=dtype)
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)


def served(tied, dtype):
    """A model whose head and embedding are stored in int8, loaded and packed."""
    names = {"embed_tokens"} if tied else {"embed_tokens", "lm_head"}
    config = RiaConfig(RiaSchema(sparsity_config=SparsityConfig()))
    config.int8, model = names, Model(tied, dtype)
    takers, widened = match_heads(config, model, True)
    assert widened is None and set(takers) == {f"{name}.{part}" for name in names for part in STORED}
    assert model.embed_tokens.quant_method.multiplies == tied
    for name in names:
        for part, tensor in STORED.items():
            takers[f"{name}.{part}"](part, tensor)
    for layer in model.children():
        layer.quant_method.process_weights_after_loading(layer)
    return model


@each_dtype
@pytest.mark.parametrize("tied", [False, True])
def test_logits(tied, dtype, become):
    x = torch.randn(5, WIDTH).to(dtype)
    bias = torch.randn(WORDS)
    want = x.double() @ DENSE.T
    found = []
    for size in (1, 2):
        logits = []
        for rank in range(size):
            become(rank, size)
            head = served(tied, dtype).lm_head
            logits.append(head.quant_method.apply(head, x))
            here = torch.nn.functional.pad(bias, (0, 320 - WORDS))[len(logits[-1][0]) * rank :][: len(logits[-1][0])]
            added = head.quant_method.apply(head, x, bias=here.to(dtype))
            torch.testing.assert_close(added.float(), logits[-1].float() + here.to(dtype).float(), rtol=0.01, atol=0.01)
        found.append(torch.cat(logits, -1))
        assert found[-1].shape == (5, 320) and bool((found[-1][:, WORDS:] == 0).all())
    assert torch.equal(*found)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0][:, :WORDS].double(), want, rtol=eps, atol=5e-5 * float(want.abs().max()))


@each_dtype
@pytest.mark.parametrize("tied", [False, True])
def test_a_lookup_gives_the_widened_rows(tied, dtype, become):
    ids = torch.randperm(WORDS)
    rows = (STORED["integers"].float() * STORED["weight_scale"]).to(dtype)[ids]
    for size in (1, 2):
        found = torch.zeros_like(rows)
        for rank in range(size):
            become(rank, size)
            found += served(tied, dtype).embed_tokens(ids)
        assert torch.equal(found, rows)


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("integers", STORED["integers"].float(), "torch.float32"),
        ("integers", STORED["integers"][:, :64], "expected torch.int8 .out, 128."),
        ("integers", STORED["integers"][1:], "292 rows, but the model has 293"),
        ("weight_scale", STORED["weight_scale"].double(), "torch.float64"),
        ("weight_scale", STORED["weight_scale"] * 0, "not a positive finite number"),
    ],
)
def test_other_tensors_are_refused_by_name(part, tensor, words, become):
    model = served(False, torch.bfloat16)
    with pytest.raises(RiaError, match=f"lm_head.{part}: .*{words}"):
        model.lm_head.quant_method.take(model.lm_head, part, tensor)


def test_where_vllm_needs_a_plain_head_the_model_gets_one(become, monkeypatch):
    config, model = RiaConfig(RiaSchema(sparsity_config=SparsityConfig())), Model(False, torch.float32)
    config.int8 = {"lm_head", "elsewhere"}
    assert EngineOptions.current().needs_plain_head is None
    monkeypatch.setattr(get_current_vllm_config(), "lora_config", object())
    assert EngineOptions.current().needs_plain_head == "adapters may change it"
    takers, widened = match_heads(config, model, True)
    assert not takers and type(model.lm_head.quant_method) is UnquantizedEmbeddingMethod
    tensors = [(f"lm_head.{part}", tensor) for part, tensor in STORED.items()]
    stream = [*tensors[:1], ("norm.weight", torch.ones(3)), *tensors[1:]]
    found = dict(widened.translate(stream))
    assert found.keys() == {"norm.weight", "lm_head.weight"}
    assert torch.equal(found["lm_head.weight"].double(), DENSE.float().double())
    with pytest.raises(RiaError, match="lm_head.weight_scale is in none"):
        list(widened.translate(stream[:2]))


@pytest.mark.parametrize(("method", "shares"), [("draft_model", False), ("eagle3", True), ("mtp", True)])
def test_a_target_is_widened_only_for_a_draft_that_may_share_its_head(method, shares, become, monkeypatch):
    config, model = RiaConfig(RiaSchema(sparsity_config=SparsityConfig())), Model(False, torch.float32)
    config.int8 = {"embed_tokens", "lm_head"}
    speculative = SimpleNamespace(method=method, draft_model_config=object(), target_model_config=object())
    monkeypatch.setattr(get_current_vllm_config(), "speculative_config", speculative)
    takers, widened = match_heads(config, model, True)
    assert (widened is not None) == shares and len(takers) == (0 if shares else 4)


def test_a_linear_that_is_widened_leaves_the_head_in_int8(become):
    schema = RiaSchema(sparsity_config=SparsityConfig(), weights=WeightQuantization(), int8_linears=["elsewhere"])
    config, model = RiaConfig(schema), Model(False, torch.float32)
    config.int8 = {"elsewhere", "lm_head"}
    takers, widened = match_heads(config, model, True)
    assert widened is not None and set(takers) == {f"lm_head.{part}" for part in STORED}


def test_a_draft_gets_a_plain_head(become):
    config, model = RiaConfig(RiaSchema(sparsity_config=SparsityConfig())), Model(False, torch.float32)
    config.int8 = {"lm_head"}
    assert match_heads(config, model, False)[1] is not None
    assert match_heads(config, model, True)[1] is None and type(model.lm_head.quant_method) is Int8EmbeddingMethod

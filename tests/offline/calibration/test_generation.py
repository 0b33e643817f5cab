"""The text that the dense model writes, by models that keep different things of what they have read."""

from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast
from zoo.toy import build
from zoo.toys import TOYS

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration import written
from ria_vllm.offline.calibration.written import PROMPTS, Prompts, from_model
from ria_vllm.progress import Monitor

SEED = 3
# The configurations of these have no such keys.
NO_ATTENTION = dict.fromkeys(["num_attention_heads", "num_key_value_heads"])


def toy(name: str, folder: Path) -> Path:
    found = TOYS[name]
    return build(name, replace(found, settings=found.settings | NO_ATTENTION) if name == "mamba2" else found, folder)


def written_without_cache(model, bos: int, samples: int, length: int) -> torch.Tensor:
    """By its own distribution, reading everything again for each token."""
    draw = torch.Generator().manual_seed(SEED)
    vocabulary = model.config.vocab_size
    tokens = torch.cat([torch.full((samples, 1), bos), torch.randint(vocabulary, (samples, 1), generator=draw)], 1)
    while tokens.shape[1] < length:
        with torch.no_grad():
            chances = model(input_ids=tokens, use_cache=False).logits[:, -1].float().softmax(-1)
        point = torch.rand(samples, 1, generator=draw) * chances.sum(-1, keepdim=True)
        following = (chances.cumsum(-1) <= point).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


@pytest.mark.parametrize("name", ["ernie4_5", "mamba2", "jamba"])
def test_what_a_model_keeps_of_a_text_does_not_change_what_it_writes(name, tmp_path):
    folder = toy(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    read, forward = [], model.forward

    @wraps(forward)
    def watched(*args, **kwargs):
        read.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    model.forward = watched
    found = from_model(model, 0, samples=3, seq_len=40, seed=SEED, monitor=Monitor(shown=False))
    assert read == [2] + [1] * 37
    assert torch.equal(found, written_without_cache(model, 0, 3, 40))
    assert len({*map(tuple, found.tolist())}) == 3 and len(found.unique()) > 20


def test_a_model_that_keeps_nothing_reads_all_again(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    forward, asked = model.forward, []

    @wraps(forward)
    def forgetful(use_cache, **kwargs):
        asked.append(use_cache)
        return CausalLMOutputWithPast(logits=forward(use_cache=use_cache, **kwargs).logits)

    model.forward = forgetful
    found = from_model(model, 0, samples=3, seq_len=40, seed=SEED, monitor=Monitor(shown=False))
    assert asked[1:] == [False] * 37
    assert torch.equal(found, written_without_cache(model, 0, 3, 40))


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()


def test_the_model_writes_its_own_samples(model, monkeypatch):
    monkeypatch.setattr(written, "DOCUMENT_TOKENS", 8)
    monkeypatch.setattr(written, "KV_CACHE_BYTES", 0)  # several batches
    tokens = from_model(model, 0, samples=5, seq_len=20, seed=0, monitor=Monitor(shown=False))
    assert tokens.shape == (5, 20)
    assert bool((tokens[:, ::8] == 0).all())  # every document begins with the start token
    again = from_model(model, 0, 5, 20, 0, Monitor(shown=False))
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, from_model(model, 0, 5, 20, 1, Monitor(shown=False)))


def test_samples_follow_the_models_own_distribution(model):
    """If one continuation is far more likely than all others, the model writes it."""
    with torch.no_grad():
        model.model.norm.weight.fill_(0.0)
        model.lm_head.bias = torch.nn.Parameter(torch.full((258,), -50.0).index_fill_(0, torch.tensor(77), 50.0))
    tokens = from_model(model, None, samples=2, seq_len=12, seed=0, monitor=Monitor(shown=False))
    assert bool((tokens[:, 1:] == 77).all())
    assert len(set(tokens[:, 0].tolist())) == 2  # first tokens are drawn from the whole vocabulary


def test_nan_predictions_are_an_error(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RiaError, match="NaN"):
        from_model(model, 0, 1, 8, 0, Monitor(shown=False))


ASKED = [[11, 12, 13], [21, 22], [31, 32, 33, 34, 35]]
ENDS = frozenset(range(0, 258, 6))  # an answer has some six tokens


def test_answers_follow_prompts_and_prompts_follow_answers(model):
    """Token by token and document by document, by the model's own distribution, without a cache."""
    prompts, length = Prompts(ASKED, ENDS), 48
    found = from_model(model, 0, samples=4, seq_len=length, seed=SEED, monitor=Monitor(shown=False), prompts=prompts)
    draw = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(ASKED), generator=draw).tolist() * 100
    started = []

    def start():
        """A prompt, or a random token; and whether it is a prompt."""
        started.append(len(started) % 4 in (0, 3))
        if started[-1]:
            return list(ASKED[order.pop(0)]), True
        return [0, int(torch.randint(model.config.vocab_size, (1,), generator=draw))], False

    documents, answering = map(list, zip(*(start() for _ in range(4)), strict=True))
    waiting = [document[2:] for document in documents]  # the shortest is read at once
    documents = [document[:2] for document in documents]
    for _ in range(length - 2):
        points = torch.rand(4, 1, generator=draw)
        for row, (document, rest, point) in enumerate(zip(documents, waiting, points, strict=True)):
            if rest:
                document.append(rest.pop(0))
                continue
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([document])).logits[0, -1].float().softmax(-1)
            document.append(int((chances.cumsum(-1) <= point * chances.sum()).sum()))
            if answering[row] and document[-1] in ENDS:
                opening, answering[row] = start()
                rest.extend(opening)
    assert found.tolist() == documents and len(started) > 6


def test_the_prompts_are_the_templates(model, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    assert Prompts.of(model, tokenizer) is None and Prompts.of(model, None) is None
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    model.generation_config.eos_token_id = [5, 7]
    found, lines = Prompts.of(model, tokenizer), PROMPTS.read_text().splitlines()
    assert found.ends == {5, 7, tokenizer.eos_token_id} and len(set(lines)) == 500
    assert [tokenizer.decode(tokens) for tokens in found.asked] == [f"{line}>" for line in lines]


PARTS = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"


@pytest.mark.parametrize("template", ["{{ raise_exception('images only') }}", "Hello!", PARTS])
def test_templates_of_other_kinds(template, model, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.chat_template = template
    found = Prompts.of(model, tokenizer)
    lines = PROMPTS.read_text().splitlines() if template == PARTS else None
    assert (found and [tokenizer.decode(tokens) for tokens in found.asked]) == lines


def test_a_template_with_tokens_that_the_model_does_not_know(model, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert Prompts.of(model, tokenizer) is not None
    model.resize_token_embeddings(100)
    assert Prompts.of(model, tokenizer) is None


def test_a_template_that_tells_the_day_tells_the_same_tomorrow(model, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert tokenizer.decode(Prompts.of(model, tokenizer).asked[0]).startswith("01 Jan 2026 ")


def test_prompts_with_too_much_before_them_are_left_out(model):
    def write(*asked):
        monitor = Monitor(shown=False)
        return from_model(model, 0, 4, 24, SEED, monitor, None if not asked else Prompts(asked, ENDS)).tolist()

    long, short = list(range(13)), list(range(12))
    assert write(long) == write()
    assert sum(document[:12] == short for document in write(long, short)) == 2

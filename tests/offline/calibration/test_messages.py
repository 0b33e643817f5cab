"""Conversations as calibration text, through the model's chat template."""

import json

import pytest
from transformers import AutoTokenizer

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.data import documents, from_text

STRINGS = "{% for t in tools or [] %}{{ t['function']['name'] }};{% endfor %}"
STRINGS += "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '</s>' }}{% endfor %}"
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": " Because. "}


@pytest.fixture
def tokenizer(tiny):
    found = AutoTokenizer.from_pretrained(tiny("llama"))
    found.chat_template = STRINGS
    return found


@pytest.fixture
def file(tmp_path):
    def write(*rows: dict) -> str:
        (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "chat.jsonl")

    return write


def test_the_text_is_what_the_template_makes_of_messages_and_tools(tokenizer, file):
    tools = [{"type": "function", "function": {"name": "search"}}]
    path = file(
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION], "tools": tools},
        {"text": None, "messages": [QUESTION], "tools": []},
        {"text": "plain", "messages": [QUESTION]},
        {"text": None, "messages": None},
    )
    texts = ["<user>Why?</s><assistant> Because. </s>", "search;<user>Why?</s>", "<user>Why?</s>", "plain\n\n"]
    assert list(documents(path, tokenizer)) == texts


def test_samples_of_messages_are_windows_of_the_rendered_text(tokenizer, file):
    path = file(*({"messages": [QUESTION | {"content": f"Why {i}?"}, ANSWER]} for i in range(20)))
    tokens = from_text(path, tokenizer, 8, 16, 0)
    texts = "".join(f"<user>Why {i}?</s><assistant> Because. </s>" for i in range(20))
    whole = tokenizer(texts, add_special_tokens=False).input_ids
    windows = [whole[start : start + 16] for start in range(0, len(whole) - 15, 16)]
    assert all(row in windows for row in tokens.tolist())
    assert int((tokens == tokenizer.eos_token_id).sum()) > 4  # </s> is one token, not its characters


@pytest.mark.parametrize(
    "bad",
    [[QUESTION, "Why?"], [{"content": "Why?"}], [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], 7],
)
def test_bad_messages_are_named_by_file_and_line(bad, tokenizer, file):
    """A list of parts would be printed as a list by templates such as Llama 3's."""
    with pytest.raises(RiaError, match="chat.jsonl, line 2"):
        list(documents(file({"messages": [QUESTION]}, {"messages": bad}), tokenizer))


@pytest.mark.parametrize("template", [None, "{{ raise_exception('only one') }}", "{{ messages[0]['role'] }}"])
def test_bad_templates(template, tokenizer, file):
    tokenizer.chat_template = template
    with pytest.raises(RiaError, match=r"chat.jsonl, line 1: the model.*chat template"):
        list(documents(file({"messages": [QUESTION]}), tokenizer))

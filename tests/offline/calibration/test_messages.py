"""Conversations as calibration text, through chat templates of all sorts."""

import json

import pytest
from compressing import edit_config, run_small
from transformers import AutoTokenizer

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.data import documents, from_text
from ria_vllm.offline.calibration.messages import rendered

STRINGS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '</s>' }}{% endfor %}"
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": " Because. "}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny("llama"))


def test_the_text_is_what_the_template_makes_of_it(tokenizer):
    """A list of parts is not printed as a list by templates that print whatever they are given, as Llama 3's does."""
    tokenizer.chat_template = STRINGS
    for question in (QUESTION, IN_PARTS):
        assert rendered([question, ANSWER], tokenizer, "x") == "<user>Why?</s><assistant> Because. </s>"
    two = {"role": "user", "content": [*IN_PARTS["content"], {"type": "text", "text": "How?"}]}
    assert rendered([two], tokenizer, "x") == "<user>Why?\nHow?</s>"


def test_tools_in_a_row_are_given_to_the_template(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t['function']['name'] }};{% endfor %}" + STRINGS
    tools = [{"type": "function", "function": {"name": "search"}}]
    rows = [{"messages": [QUESTION], "tools": given} for given in (tools, [], None)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = "<user>Why?</s>"
    assert list(documents(str(tmp_path / "chat.jsonl"), tokenizer)) == [f"search;{plain}", plain, plain]
    with pytest.raises(RiaError, match="x: .*refuses"):
        rendered([QUESTION], tokenizer, "x", "search")


def test_rows_with_a_text_that_is_null_are_read_as_messages(tokenizer, tmp_path):
    tokenizer.chat_template = STRINGS
    rows = [
        {"text": None, "messages": [QUESTION]},
        {"text": "plain", "messages": [QUESTION]},
        {"text": None, "messages": None},
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(documents(str(tmp_path / "chat.jsonl"), tokenizer)) == ["<user>Why?</s>", "plain\n\n"]


def test_samples_of_messages_are_windows_of_the_rendered_text(tokenizer, tmp_path):
    tokenizer.chat_template = STRINGS
    rows = [{"messages": [QUESTION | {"content": f"Why {i}?"}, ANSWER]} for i in range(20)] + [{"text": "plain"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [f"<user>Why {i}?</s><assistant> Because. </s>" for i in range(20)] + ["plain\n\n"]
    assert list(documents(str(tmp_path / "chat.jsonl"), tokenizer)) == texts
    tokens = from_text(str(tmp_path / "chat.jsonl"), tokenizer, 8, 16, 0)
    whole = tokenizer("".join(texts), add_special_tokens=False).input_ids
    windows = [whole[start : start + 16] for start in range(0, len(whole) - 15, 16)]
    assert all(row in windows for row in tokens.tolist())
    assert int((tokens == tokenizer.eos_token_id).sum()) > 4  # </s> is one token, not its characters


BAD = {
    "an image": [{"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "What?"}]}],
    "no object": [QUESTION, "Why?"],
    "no role": [{"content": "Why?"}],
    "a number": [{"role": "user", "content": 7}],
    "no text": [{"role": "user", "content": [{"type": "text"}]}],
    "no list": {"role": "user"},
    "null": None,
}


@pytest.mark.parametrize("what", BAD)
def test_bad_messages_are_named_by_file_and_line(what, tokenizer, tmp_path):
    tokenizer.chat_template = STRINGS
    rows = [{"messages": [QUESTION]}, {"messages": BAD[what]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RiaError, match="chat.jsonl, line 2"):
        list(documents(str(tmp_path / "chat.jsonl"), tokenizer))


BAD_TEMPLATES = {
    "no chat template": None,
    "refuses these messages .only one": "{{ raise_exception('only one') }}",
    "leaves out": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "leaves out ": "{% for m in messages if m['role'] != 'user' %}{{ m['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("message", BAD_TEMPLATES)
def test_bad_templates(message, tokenizer):
    tokenizer.chat_template = BAD_TEMPLATES[message]
    with pytest.raises(RiaError, match=f"chat.jsonl, line 1: .*{message}"):
        rendered([QUESTION, ANSWER], tokenizer, "chat.jsonl, line 1")


def test_compressing_with_messages(model, tmp_path):
    """With the template in the file where older processors keep it, and without any."""
    rows = [{"messages": [IN_PARTS, ANSWER]}] * 20
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit_config(model, max_position_embeddings=64)
    with pytest.raises(RiaError, match="chat.jsonl, line 1: the model has no chat template"):
        run_small(model, tmp_path / "out", tmp_path / "chat.jsonl")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": STRINGS}))
    report, _ = run_small(model, tmp_path / "out", tmp_path / "chat.jsonl")
    assert len(report["linears"]) == 14
    assert (tmp_path / "out" / "chat_template.json").read_text() == (model / "chat_template.json").read_text()

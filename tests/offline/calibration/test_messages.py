"""Conversations as calibration text, through chat templates of all sorts."""

import json
from types import SimpleNamespace

import pytest
from compressing import edit_config, run_small
from transformers import AutoTokenizer

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.data import documents, from_text
from ria_vllm.offline.calibration.messages import rendered

# As text models have it, as wrappers have it, and one that takes both.
STRINGS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '</s>' }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}"
    "{% endfor %}</s>{% endfor %}"
)
BOTH = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}</s>{% endfor %}"
)
TEMPLATES = {"strings": STRINGS, "parts": PARTS, "both": BOTH}
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": " Because. "}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny("llama"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("question", [QUESTION, IN_PARTS])
def test_the_text_is_what_the_template_makes_of_it(template, question, tokenizer):
    tokenizer.chat_template = TEMPLATES[template]
    assert rendered([question, ANSWER], tokenizer, "x") == "<user>Why?</s><assistant> Because. </s>"


def test_what_a_template_leaves_out_on_purpose_is_no_reason_for_another_form(tokenizer):
    """Such as the reasoning of earlier answers."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] + ';' }}{% endfor %}"
    messages = [QUESTION, {"role": "assistant", "content": "<think>Hm.</think>Because."}]
    assert rendered(messages, tokenizer, "x") == "Why?;Because.;"


@pytest.mark.parametrize("expression", ["{{ m['content'] }}", "{{ m['content'] | trim }}"])
def test_a_list_of_parts_is_not_printed_as_a_list(expression, tokenizer):
    """By templates that print whatever they are given, as Llama 3's does."""
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>" + expression + "</s>{% endfor %}"
    assert rendered([IN_PARTS, QUESTION], tokenizer, "x") == "<user>Why?</s><user>Why?</s>"
    two = {"role": "user", "content": [*IN_PARTS["content"], {"type": "text", "text": "How?"}]}
    assert rendered([two], tokenizer, "x") == "<user>Why?\nHow?</s>"
    empty = {"role": "assistant", "content": []}
    assert rendered([QUESTION, empty], tokenizer, "x") == "<user>Why?</s><assistant></s>"
    assert rendered([empty], tokenizer, "x") == "<assistant></s>"


def test_calls_of_tools_are_the_templates_business(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] or m['tool_calls'][0]['name'] }};{% endfor %}"
    messages = [QUESTION, {"role": "assistant", "tool_calls": [{"name": "search"}], "content": None}]
    assert rendered(messages, tokenizer, "x") == "Why?;search;"


def test_tools_in_a_row_are_given_to_the_template(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t['function']['name'] }};{% endfor %}" + STRINGS
    tools = [{"type": "function", "function": {"name": "search"}}]
    rows = [{"messages": [QUESTION], "tools": given} for given in (tools, json.dumps(tools), [], None, "")]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = "<user>Why?</s>"
    assert list(documents(str(tmp_path / "chat.jsonl"), tokenizer)) == [f"search;{plain}"] * 2 + [plain] * 3
    for wrong, message in ((tools[0], "must be a list of tools"), ("search", "is not valid JSON")):
        with pytest.raises(RiaError, match=f"x: the field 'tools' {message}. Leave the row out"):
            rendered([QUESTION], tokenizer, "x", wrong)


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
    tokenizer.chat_template = BOTH
    rows = [{"messages": [QUESTION | {"content": f"Why {i}?"}, ANSWER]} for i in range(20)] + [{"text": "plain"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [f"<user>Why {i}?</s><assistant> Because. </s>" for i in range(20)] + ["plain\n\n"]
    assert list(documents(str(tmp_path / "chat.jsonl"), tokenizer)) == texts
    tokens = from_text(str(tmp_path / "chat.jsonl"), tokenizer, 8, 16, 0)
    whole = tokenizer("".join(texts), add_special_tokens=False).input_ids
    windows = [whole[start : start + 16] for start in range(0, len(whole) - 15, 16)]
    assert all(row in windows for row in tokens.tolist())
    assert int((tokens == tokenizer.eos_token_id).sum()) > 4  # </s> is one token, not its characters


IMAGE = {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "What is it?"}]}
BAD = {
    "line 2: message 1 has a part of type 'image', but calibration reads text only": [IMAGE],
    "line 2: message 2 must be an object with a role and a content": [QUESTION, "Why?"],
    "line 2: message 1 must be an object with a role": [{"content": "Why?"}],
    "line 2: message 1: its content must be a string or a list of parts, not int": [{"role": "user", "content": 7}],
    "line 2: message 1 has a part of type 'str'": [{"role": "user", "content": ["Why?"]}],
    "line 2: message 1 has a part of type 'text' without a text": [{"role": "user", "content": [{"type": "text"}]}],
    "line 2: the field 'messages' must be a list": {"role": "user"},
    "line 2: no JSON object with a field 'text' or 'messages'": None,
}


@pytest.mark.parametrize("message", BAD)
def test_bad_messages_are_named_by_file_and_line(message, tokenizer, tmp_path):
    tokenizer.chat_template = BOTH
    rows = [{"messages": [QUESTION]}, {"messages": BAD[message]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RiaError, match=f"chat.jsonl, {message}"):
        list(documents(str(tmp_path / "chat.jsonl"), tokenizer))


BAD_TEMPLATES = {
    "the model has no chat template": None,
    "the model's chat template refuses these messages .only one": "{{ raise_exception('only one') }}",
    "refuses these messages": "{% for m in messages %}{{ m['content'].pop() + 7 }}{% endfor %}",
    "leaves out what these messages say": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
}


@pytest.mark.parametrize("message", BAD_TEMPLATES)
def test_bad_templates(message, tokenizer):
    tokenizer.chat_template = BAD_TEMPLATES[message]
    with pytest.raises(RiaError, match=f"chat.jsonl, line 1: .*{message}"):
        rendered([QUESTION, ANSWER], tokenizer, "chat.jsonl, line 1")
    with pytest.raises(RiaError, match="no chat template"):
        rendered([QUESTION], SimpleNamespace(), "x")


def test_compressing_with_messages(model, tmp_path):
    """With the template in the file where older processors keep it, and without any."""
    rows = [{"messages": [IN_PARTS, ANSWER]}] * 20
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit_config(model, max_position_embeddings=64)
    with pytest.raises(RiaError, match="chat.jsonl, line 1: the model has no chat template"):
        run_small(model, tmp_path / "out", tmp_path / "chat.jsonl")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    report, _ = run_small(model, tmp_path / "out", tmp_path / "chat.jsonl")
    assert len(report["linears"]) == 14
    assert (tmp_path / "out" / "chat_template.json").read_text() == (model / "chat_template.json").read_text()

"""Conversations as calibration text: what the model's chat template makes of them."""

from typing import Any

from ria_vllm.errors import RiaError, printable
from ria_vllm.offline.model.run.hf import first_line

SIDES = ("user", "assistant")
WAY_OUT = "Leave the row out, or give a field 'text'."


def rendered(messages: Any, tokenizer: Any, place: str, tools: Any = None) -> str:
    """The text that the model reads for a conversation.

    Args:
        messages: untrusted; should be a list of {"role", "content"}, where content is a string or a list of parts
            {"type": "text", "text"}, which become one string. Other keys, such as tool_calls, are the template's
            business.
        tokenizer: with the template.
        place: file and line, for errors.
        tools: untrusted; should be a list of the tools that the model may call, or None.

    Raises:
        RiaError: something else, a part that is not text, no template, or one that fails or leaves something out.
    """
    if not isinstance(messages, list) or not messages:
        raise RiaError(f"{place}: the field 'messages' must be a list of messages. {WAY_OUT}")
    plain = [_as_string(message, f"{place}: message {number}") for number, message in enumerate(messages, 1)]
    if getattr(tokenizer, "chat_template", None) is None:
        raise RiaError(f"{place}: the model has no chat template to turn messages into text. Give a field 'text'.")
    try:
        text = str(tokenizer.apply_chat_template(plain, tools=tools or None, tokenize=False))
    except Exception as error:  # a template is untrusted, and may raise anything
        reason = printable(first_line(error))
        raise RiaError(f"{place}: the model's chat template refuses these messages ({reason}). {WAY_OUT}") from None
    # Templates may leave out thoughts, and what they do not know of a system. The last word of each side is there.
    last = {message["role"]: message["content"] for message in plain if message.get("content")}
    said = [content.rpartition("</think>")[2].strip() for role, content in last.items() if role in SIDES]
    if not all(part in text for part in said or list(last.values())):
        raise RiaError(f"{place}: the model's chat template leaves out what these messages say. {WAY_OUT}")
    return text


def _as_string(message: Any, place: str) -> dict[str, Any]:
    """The message, its content a string, or none where it only calls a tool."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RiaError(f"{place} must be an object with a role and a content. {WAY_OUT}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list) or not all(_is_text(part) for part in content):
        raise RiaError(f"{place}: its content must be a string or a list of parts that are text. {WAY_OUT}")
    return message | {"content": "\n".join(part["text"] for part in content)}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)

"""Conversations as calibration text: what the model's chat template makes of them."""

import json
from typing import Any

from ria_vllm.errors import RiaError, printable
from ria_vllm.offline.model.run.hf import first_line

WAY_OUT = "Leave the row out, or give a field 'text'."


def rendered(messages: Any, tokenizer: Any, place: str, tools: Any = None) -> str:
    """The text that the model reads for a conversation.

    Templates differ in whether they take a message's text as a string or as a list of parts. The messages are tried as
    they are and in the other form. The text that holds most of what they say is taken, and the shortest of several: a
    template for strings writes the brackets and quotes of a list of parts around what it says.

    Args:
        messages: untrusted; should be a list of {"role", "content"}, where content is a string or a list of parts
            {"type": "text", "text"}. Other keys, such as tool_calls, are the template's business.
        tokenizer: with the template.
        place: file and line, for errors.
        tools: untrusted; should be a list of the tools that the model may call, the same as JSON, or None.

    Raises:
        RiaError: something else, a part that is not text, no template, or one that fails or leaves all of it out.
    """
    texts = [
        _texts(message, f"{place}: message {number}") for number, message in enumerate(_listed(messages, place), 1)
    ]
    if getattr(tokenizer, "chat_template", None) is None:
        raise RiaError(f"{place}: the model has no chat template to turn messages into text. Give a field 'text'.")
    if isinstance(tools, str):  # data sets whose rows differ in their tools store them as JSON
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise RiaError(f"{place}: the field 'tools' is not valid JSON. {WAY_OUT}") from None
    if tools is not None and not isinstance(tools, list):
        raise RiaError(f"{place}: the field 'tools' must be a list of tools. {WAY_OUT}")
    said = [text.strip() for parts in texts for text in parts if text.strip()]
    as_strings = [_with(m, "\n".join(parts)) for m, parts in zip(messages, texts, strict=True)]
    as_parts = [
        _with(m, [{"type": "text", "text": text} for text in parts]) for m, parts in zip(messages, texts, strict=True)
    ]
    found: list[tuple[int, str]] = []
    failed: Exception | None = None
    for form in (messages, as_strings, as_parts):
        try:
            text = str(tokenizer.apply_chat_template(form, tools=tools or None, tokenize=False))
        except Exception as error:  # a template is untrusted, and may raise anything
            failed = failed or error
            continue
        found.append((sum(part in text for part in said), text))
    if not found:
        raise RiaError(f"{place}: the model's chat template refuses these messages ({_reason(failed)}). {WAY_OUT}")
    held, text = max(found, key=lambda entry: (entry[0], -len(entry[1])))
    if said and not held:
        raise RiaError(f"{place}: the model's chat template leaves out what these messages say. {WAY_OUT}")
    return text


def _listed(messages: Any, place: str) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise RiaError(f"{place}: the field 'messages' must be a list of messages. {WAY_OUT}")
    return messages


def _texts(message: Any, place: str) -> list[str]:
    """The texts in a message; none if it has no content, as one that calls a tool."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RiaError(f"{place} must be an object with a role and a content. {WAY_OUT}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [] if content is None else [content]
    if not isinstance(content, list):
        kind = type(content).__name__
        raise RiaError(f"{place}: its content must be a string or a list of parts, not {kind}. {WAY_OUT}")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise RiaError(
                f"{place} has a part of type {printable(str(kind))[:40]!r}, but calibration reads text only. Leave the "
                "row out, or only its text in."
            )
        if not isinstance(part.get("text"), str):
            raise RiaError(f"{place} has a part of type 'text' without a text. {WAY_OUT}")
    return [part["text"] for part in content]


def _with(message: dict[str, Any], content: Any) -> dict[str, Any]:
    return message | {"content": content} if message.get("content") is not None else message


def _reason(error: Exception | None) -> str:
    return "" if error is None else printable(first_line(error))

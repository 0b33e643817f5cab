"""Keys and tokens, which stay out of results and logs."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO

HIDDEN = "***"
# Such as --api-key, --hf_token, and HF_TOKEN or VLLM_API_KEY in the environment.
OPTION = re.compile(r"--?[\w.-]*\b(key|token|secret|password|headers?)", re.IGNORECASE)
VARIABLE = re.compile(r"(\w+_)?(KEY|TOKEN|SECRET|PASSWORD|HEADERS)", re.IGNORECASE)
SHORTEST = 8  # characters of a variable's value that can be a secret; others, such as 1, occur everywhere


def hidden(arguments: Sequence[str]) -> list[str]:
    """A command line as it may be shown."""
    return [shown + HIDDEN * bool(secret) for shown, secret in _divided(arguments)]


def secrets_of(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The secrets in a command line and in environment variables."""
    found = {secret for _, secret in _divided(arguments) if secret}
    found |= {value for name, value in environment.items() if VARIABLE.fullmatch(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _divided(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each argument: (what may be shown, the secret that follows it or ""). An option may have several values."""
    secret = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            secret = OPTION.fullmatch(name.replace("_", "-")) is not None
            yield (name + equals, value) if secret else (argument, "")
        else:
            yield ("", argument) if secret else (argument, "")


def pass_on(source: IO[bytes], target: IO[bytes], secrets: Sequence[str]) -> None:
    """Write what a pipe gives as it comes, but for secrets, until its end. Secrets are found as whole words.

    Args:
        secrets: longer ones first.
    """
    words = [secret.encode() for secret in secrets]
    pattern = re.compile(rb"(?<!\w)(?:" + (b"|".join(map(re.escape, words)) or b"(?!)") + rb")(?!\w)")
    text = b""
    while chunk := os.read(source.fileno(), 1 << 16):
        text += chunk
        # What a secret may begin with waits for the rest.
        begun = max((n for word in words for n in range(1, len(word) + 1) if text.endswith(word[:n])), default=0)
        end = len(text) - begun
        end = min([end, *(match.start() for match in pattern.finditer(text) if match.end() > end)])
        with suppress(OSError):  # a full disk: the command goes on
            target.write(pattern.sub(HIDDEN.encode(), text[:end]))
        text = text[end:]
    with suppress(OSError):
        target.write(pattern.sub(HIDDEN.encode(), text))

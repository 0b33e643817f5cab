"""The one exception type that reaches a user as a plain message."""


def printable(text: str, lines: bool = False) -> str:
    """`text` with control characters, and all else that a terminal would obey or cannot show, escaped.

    Args:
        lines: keep line feeds. Our own messages may contain them; a name or value from a file may not.
    """
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class RiaError(Exception):
    """Bad input or a broken checkpoint.

    The message says what is wrong, where (file, layer) and what to do about it. The command line prints it without a
    traceback.
    """

    def __init__(self, *message: object):
        super().__init__(*(printable(str(part), lines=True) for part in message))  # it may quote names from files

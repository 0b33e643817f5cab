"""The one exception type that reaches a user as a plain message."""


def printable(text: str, lines: bool = False) -> str:
    """`text` without what a terminal would obey or could not show: control characters and the like, escaped.

    Args:
        lines: keep line feeds, as a message of our own may have them; a name or value from a file may not.
    """
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class RiaError(Exception):
    """Bad input or a broken checkpoint.

    The message says what is wrong, where (file, layer) and how to go on; the command line prints it without a
    traceback.
    """

    def __init__(self, *message: object):
        super().__init__(*(printable(str(part), lines=True) for part in message))  # names from files may be part of it

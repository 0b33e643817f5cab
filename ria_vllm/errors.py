"""The one exception type that reaches a user as a plain message."""


class RiaError(Exception):
    """Bad input or a broken checkpoint.

    The message says what is wrong, where (file, layer) and how to go on; the command line prints it without a
    traceback.
    """

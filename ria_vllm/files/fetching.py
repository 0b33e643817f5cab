"""The one error of all that is fetched from the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager

from ria_vllm.errors import RiaError


@contextmanager
def hub_errors(repository: str, missing: str) -> Iterator[None]:
    """Turn any error into a RiaError that begins with `missing`, what is not on this machine."""
    try:
        yield
    except Exception as error:
        raise RiaError(
            f"{missing}, and the hub did not provide it ({' '.join(str(error).split())}). Check the name, run "
            f"`hf auth login` if access is restricted, or give a folder with the whole repository (`hf download "
            f"{repository}`)."
        ) from None

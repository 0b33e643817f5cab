"""The files that a run reads, and whether they are still those that it began with.

A run may take hours, and reads its inputs again and again. If one is replaced meanwhile, the result would be of two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ria_vllm.checkpoint.companions import is_companion, nested_companions
from ria_vllm.errors import RiaError
from ria_vllm.format.schema import PROOFS_FILE, REPORT_FILE

Stamps = dict[str, list[str | int]]
"""The place of a file in its folder, "" for a file alone -> what tells its content from an earlier one: as in JSON."""


class ChangedInput(RiaError):
    """A file is no longer what it was when the run began; `advice` says how to go on."""

    def __init__(self, path: Path, advice: str = "Leave it as it is, and run the same command again."):
        self.path = path
        super().__init__(f"{path}: has changed since this run began, so the result would be of two inputs. {advice}")


class Inputs:
    """Files and models' folders, with their stamps from before the run has read anything of them.

    Of a folder, these are the weights and the files that go with them, but for the model card and the report, which
    `eval --update-card` may change meanwhile.
    """

    def __init__(self, *places: Path):
        self._before: dict[Path, Stamps] = {}
        for place in places:
            self.stamps(place)

    def stamps(self, place: Path) -> Stamps:
        """Those of a file or folder at the first call, which later runs may find again; none if it is not there."""
        if place not in self._before:
            try:
                self._before[place] = _stamps(place)
            except OSError:  # whoever reads it says why it cannot be read
                self._before[place] = {}
        return {name: stamp[:2] for name, stamp in self._before[place].items()}

    def check(self) -> None:
        """Check that nothing has changed since.

        Raises:
            ChangedInput: a file has, or is new.
            RiaError: a file cannot be read any more; the cause is the system's error, as it may be back soon.
        """
        for place, before in self._before.items():
            try:
                now = _stamps(place)
                changed = next((name for name in now if now[name] != before.get(name)), None)
                if changed is not None:
                    raise ChangedInput(place / changed)
                for name in sorted(before.keys() - now.keys()):
                    (place / name).stat()
                    raise ChangedInput(place / name)
            except OSError as error:
                raise RiaError(
                    f"{error.filename or place}: cannot be read any more ({error.strerror or error}). Once it can, run "
                    "the same command again; `compress` and `distill` go on from what is finished if you add --resume."
                ) from error

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Where inputs have changed, let errors say so: whatever else they say is a consequence.

        Raises:
            ChangedInput: in the place of another error.
        """
        try:
            yield
        except ChangedInput:
            raise
        except Exception as error:
            try:
                self.check()
            except ChangedInput as changed:
                raise changed from error
            except RiaError:  # a file that cannot be read, of which the first error may say more
                pass
            raise


def _stamps(place: Path) -> Stamps:
    if not place.is_dir():
        return {"": _stamp(place)} if place.is_file() else {}  # a pipe is read once
    files = [p for p in place.iterdir() if (is_companion(p) and p.name != REPORT_FILE) or _is_weights(p)]
    try:
        files += nested_companions(place)
    except RiaError:  # whoever copies them says what is wrong
        pass
    files += [place / PROOFS_FILE] if (place / PROOFS_FILE).is_file() else []
    return {path.relative_to(place).as_posix(): _stamp(path) for path in sorted(files)}


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" and not path.name.startswith(".") and path.is_file()


def _stamp(path: Path) -> list[str | int]:
    """Size and time of the last change; in the hub's cache the name, which is a digest: a file may come there again.

    Elsewhere the last one is the time at which the system saw the file change, move or get another time, which nobody
    can set: it tells a file that was away for a while, and one of the same size and time.
    """
    found, place = path.stat(), path.resolve()
    if place.parent.name == "blobs" and place.parent.parent.name.startswith("models--"):
        return [found.st_size, place.name]
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]

"""The work folder of a run, and how an interrupted run is recognised and resumed."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ria_vllm.checkpoint.inputs import ChangedInput
from ria_vllm.checkpoint.writer import UNITS, CheckpointWriter, disk_errors, write_whole
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.offline.model.source import Source
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.stored_layers import layer_key

FINGERPRINT_FILE = "run.json"
CONFIG = "config.json"
# The fingerprint in a finished folder that a run of two halves goes on from. Its name keeps it out of copies.
HALF_FILE = ".run.json"


def fingerprint(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Everything that the bytes of the result depend on, as read back from JSON."""
    text, held_out = Path(recipe.calibration), recipe.eval_text
    stamps = {
        CONFIG: {"sha256": source.config_digest},  # it may be written otherwise
        "state of the model": {name: stamp for name, stamp in source.stamps.items() if name != CONFIG},
        "state of the calibration text": source.inputs.stamps(text) if text.is_file() else None,
    }
    if held_out is not None:
        stamps["state of the eval text"] = source.inputs.stamps(Path(held_out))
    # Full paths: this stays in the work folder.
    names = {"source": source.name, "calibration": recipe.calibration, "eval_text": held_out}
    return json.loads(json.dumps(recipe.dump(source.name) | names | stamps))


def begun_run(out: Path) -> dict[str, Any]:
    """The fingerprint of the run that was begun for `out`; empty if there is none.

    Raises:
        RiaError: it is damaged.
    """
    path = _work(out) / FINGERPRINT_FILE
    try:
        return read_json(path) if path.is_file() else {}
    except RiaError:
        raise RiaError(
            f"--resume: {path} is damaged, so it is unknown which run this is from. Leave out --resume to start again."
        ) from None


@contextmanager
def work_folder(
    out: Path,
    run: dict[str, Any],
    overwrite: bool,
    resume: bool,
    kept: tuple[str, str] = (f"{layer_key(0)}*", "Finished layers and experts"),
) -> Iterator[CheckpointWriter]:
    """The work folder: a new one or, with `resume`, that of an interrupted run with the same fingerprint.

    After a RiaError, it is removed unless it holds something worth keeping, or the system may have been at fault.

    Args:
        run: the fingerprint of this run.
        kept: a pattern for the keys of what is worth keeping, and what to call it.

    Raises:
        RiaError: the interrupted run had other options, another source or other versions.
    """
    work = _work(out)
    with closing(CheckpointWriter(out, overwrite, resume=True)) as writer:
        # Read once no other process can change it any more.
        begun = begun_run(out) if resume else {}
        check_same_run(work, begun, run)
        if not begun:
            writer.restart()
        with disk_errors(work):
            write_whole(work / FINGERPRINT_FILE, json.dumps(run))
        try:
            yield writer
        except RiaError as error:
            # A full disk, an unreachable file or an occupied output folder can be fixed, and the run resumed. Any other
            # error after hours of work may not happen again, or may be fixed in another version. What is finished is
            # never lost. It is of the input from before if one has changed, which may be put back.
            if not isinstance(error.__cause__, OSError):
                if any((work / UNITS).glob(f"{kept[0]}.safetensors")):
                    way = f"{kept[1]} are kept in {work}: --resume continues from them"
                    found = RiaError(f"{error} {way} with the same options. With other options, leave it out.")
                    if isinstance(error, ChangedInput):
                        found = ChangedInput(error.path, f"{way} once it is as it was. Otherwise leave out --resume.")
                    raise found from error.__cause__
                writer.discard()
            raise


def _work(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_same_run(work: Path, begun: dict[str, Any], run: dict[str, Any]) -> None:
    """Check that the fingerprint of an interrupted run, empty if there is none, is that of this run.

    Raises:
        RiaError: it is not; `work`, the folder where it was found, is named.
    """
    differing = [key for key in run | begun if begun and begun.get(key) != run.get(key)]
    if differing[:1] == ["versions"]:
        raise RiaError(f"--resume: {work} is from a run with {_other_versions(begun['versions'], run['versions'])}")
    if differing:
        what, before = differing[0].replace("_", "-"), begun.get(differing[0])
        shown = f" ({before})" if isinstance(before, str | int | float) else ""
        raise RiaError(
            f"--resume: {work} is from a run with another {what}{shown}. Give the same one, or leave out --resume."
        )


def _other_versions(before: Any, now: dict[str, str]) -> str:
    before = before if isinstance(before, dict) else {}
    differing = [name for name in now if before.get(name) != now[name]]
    then, here = (", ".join(f"{name} {found.get(name)}" for name in differing) for found in (before, now))
    return f"{then}; here it is {here}. Install the versions of that run, or leave out --resume."

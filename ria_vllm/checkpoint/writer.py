"""Writing a checkpoint so that it appears whole or not at all, and an interrupted run loses nothing that was finished.

OUT.partial/ holds the work: one safetensors file per finished unit (the embeddings, each decoder layer, the head), put
in place by a rename. When all units are there, their bytes are copied into shards, and the folder is renamed to OUT.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.checkpoint.lock import LOCK_FILE, delete_locked, is_free, locked
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.shards import copy_tensors, tensor_entries, weights_digest, write_shards
from ria_vllm.checkpoint.side_files import load_permutations
from ria_vllm.errors import RiaError
from ria_vllm.format import permutation, proofs
from ria_vllm.format.schema import (
    DIGESTS,
    PERMUTATION_SUFFIX,
    PERMUTATIONS_FILE,
    PROOFS_FILE,
    QUANT_METHOD,
    Proofs,
)

UNITS = "units"
SEED = 1  # of the vector that matrices are proved with; any would do


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says where it is and how to continue."""
    try:
        yield
    except SafetensorError as error:
        # safetensors writes in Rust; the text "(os error N)" is all that is left of the system's error.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        with disk_errors(where):
            raise OSError(int(number.group(1)), os.strerror(int(number.group(1)))) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RiaError(
                f"{where}: no space left on the disk. Free some and run the same command again; `compress` and "
                "`distill` go on from what is finished if you add --resume."
            ) from error
        raise RiaError(f"{where}: cannot write ({error.strerror or error}).") from error


def check_place(out: Path, source: Path) -> None:
    """Refuse to write to the folder that `source` is read from, or around it: --overwrite would delete the source.

    Raises:
        RiaError: it is such a folder, or `out` has no name of its own, such as "." or "/", or begins with "~", or has a
            name that file systems do not take.
    """
    if out.parts[:1] == ("~",):
        raise RiaError(f"{out}: no shell has replaced the ~ by your home folder. Write {out.expanduser()}.")
    if out.name in ("", ".."):
        raise RiaError(f"{str(out)!r} cannot be replaced by a new folder. Choose another one, with a name of its own.")
    if len(os.fsencode(f"{out.name}.pruned.partial")) > 255:  # the longest name of a work folder
        raise RiaError(f"{out.name}: this name is too long for a folder. Choose a shorter one, of at most 240 bytes.")
    if not source.exists():
        return  # a hub id
    place, read = out.resolve(), source.resolve()
    if place == read:
        raise RiaError(f"{out}: this is the folder being read. Choose another one.")
    if place in read.parents:
        raise RiaError(f"{out}: holds what is being read, {source}. Choose another folder.")


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists, unless it may and can be replaced."""
    if os.path.ismount(out):
        raise RiaError(f"{out}: a mount point, which cannot be replaced. Choose a folder in it: {out / 'model'}.")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise RiaError(f"{out}: exists already. Choose another folder, or give --overwrite.")


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def delete(path: Path) -> None:
    """Delete a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(folder: Path, out: Path, replaced: Path) -> None:
    """Rename `folder` to `out`. What was there waits at `replaced`, so that nothing is lost if this is interrupted."""
    if os.path.lexists(out):
        delete(replaced)  # left by a run that was killed before it could
        os.replace(out, replaced)
    os.replace(folder, out)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole, or not at all. A link is replaced; what it leads to stays as it is.

    Raises:
        OSError: it cannot be written; see `disk_errors`.
    """
    if (path.exists() and not path.is_file()) or path.is_relative_to("/dev"):  # a device or a pipe
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_whole(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is there whole, or not at all, whatever interrupts it.

    Raises:
        OSError, SafetensorError: it cannot be written; see `disk_errors`.
    """
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class CheckpointWriter:
    """The work folder of one output folder. One process at a time may have it.

    Args:
        out: the output folder. It must not exist unless `overwrite`; only the last rename touches it.
        resume: keep the finished units of an interrupted run.

    Raises:
        RiaError: `out` exists and may not be replaced, or another process uses the work folder, or it cannot be made.
    """

    def __init__(self, out: Path, overwrite: bool = False, resume: bool = False):
        self.out = Path(out)
        self.overwrite = overwrite
        self.work = self.out.with_name(self.out.name + ".partial")
        if not _is_utf8(self.out):  # safetensors writes there, but reads nothing
            raise RiaError(f"{self.out}: this name is not UTF-8. Choose another output folder.")
        check_free(self.out, overwrite)
        with disk_errors(self.work):
            if not is_free(self.work, f"{UNITS}/"):
                raise RiaError(f"{self.work}: needed as a work folder, but it holds something else. Move it away.")
            self._lock: IO[bytes] | None = locked(self.work)
            if self._replaced.is_dir() and not self.out.exists():
                # A run was killed between its last two renames.
                os.replace(self._replaced, self.out)
                check_free(self.out, overwrite)
            if not resume:
                self._empty()
            (self.work / UNITS).mkdir(exist_ok=True)

    def restart(self) -> None:
        """Delete what an interrupted run has left."""
        with disk_errors(self.work):
            self._empty()
            (self.work / UNITS).mkdir()

    def _empty(self) -> None:
        """Delete all but the lock, and last what shows that the folder is ours."""
        for path in sorted(self.work.iterdir(), key=lambda path: path.name == UNITS):
            if path.name != LOCK_FILE:
                delete(path)

    def path(self, key: str) -> Path:
        return self.work / UNITS / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).is_file()

    def write(self, key: str, tensors: dict[str, torch.Tensor], record: dict[str, Any] | None = None) -> None:
        """Finish a unit. `finish` moves `NAME.input_permutation` to a file of its own; `record` is kept."""
        with disk_errors(self.path(key)):
            save_whole(tensors, self.path(key), {"record": json.dumps(record or {}, sort_keys=True)})

    def remove(self, key: str) -> None:
        """Remove a unit that is no part of the result, if it is there."""
        self.path(key).unlink(missing_ok=True)

    def read(self, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors and the record of a finished unit."""
        with safe_open(self.path(key), framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, record

    def record(self, key: str) -> dict[str, Any]:
        with safe_open(self.path(key), framework="pt") as file:
            return json.loads((file.metadata() or {}).get("record", "{}"))

    def names(self, key: str) -> list[str]:
        """The tensors of a finished unit."""
        return [name for name, *_ in tensor_entries(self.path(key))]

    def finish(
        self,
        keys: Sequence[str],
        files: dict[str, Any],
        copies: Mapping[str, Path],
        max_shard_size: int,
        permuted: bool = False,
        inputs: Inputs | None = None,
    ) -> None:
        """Join the units `keys` into shards in that order, add the other files, and rename the folder to `out`.

        If `out` has appeared meanwhile and may not be replaced, the RiaError's cause is a FileExistsError, and the
        result stays in the work folder.

        Args:
            files: file name -> content, of JSON (config.json, the report) or as text (the model card).
            copies: place in the folder -> file to copy (tokenizer, generation config), unless `files` has it.
            max_shard_size: bytes; a single larger tensor gets a shard of its own.
            permuted: the recipe permutes: write the permutations file and its digest even if there are none.
            inputs: must not have changed once all of them that is needed is copied.
        """
        final = self.work / "final"
        with disk_errors(self.work):
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir()
            for place, source in copies.items():
                (final / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, final / place)
            if inputs is not None:
                inputs.check()
            entries = [entry for key in keys for entry in tensor_entries(self.path(key))]
            permutations = [e for e in entries if e[0].endswith(PERMUTATION_SUFFIX)]
            weights = [e for e in entries if not e[0].endswith(PERMUTATION_SUFFIX)]
            digests = {"weights_digest": weights_digest(weights)}
            if permutations or permuted:
                copy_tensors(permutations, final / PERMUTATIONS_FILE)
                digests["permutations_digest"] = permutation.digest(load_permutations(final / PERMUTATIONS_FILE))
            files, metadata = _with_digests(files, digests)
            for name, content in files.items():
                text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
                (final / name).write_text(text, encoding="utf-8")
            write_shards(weights, final, max_shard_size, metadata)
            ours = metadata and any(name.endswith((".compressed", ".integers")) for name, *_ in weights)
            if ours:
                _add_proofs(final)
            _sync(final)
            self._replace(final)

    @property
    def _replaced(self) -> Path:
        """Where the former output folder waits for its successor."""
        return self.work / "replaced"

    def _replace(self, final: Path) -> None:
        if self.out.exists() or self.out.is_symlink():
            if not self.overwrite:
                raise RiaError(
                    f"{self.out}: appeared during the run; the result is in {final}. Move it where you want it."
                ) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.out))
        put_in_place(final, self.out, self._replaced)
        self._delete()

    def _delete(self) -> None:
        assert self._lock is not None
        self._empty()
        delete_locked(self.work, self._lock)
        self._lock = None

    def discard(self) -> None:
        """Delete the work folder, as far as possible, if this writer still has it."""
        if self._lock is not None:
            with suppress(OSError):
                self._delete()
            self.close()

    def close(self) -> None:
        """Leave the work folder, as it is, to other processes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextmanager
def discarded_on_failure(writer: CheckpointWriter) -> Iterator[None]:
    """Delete the work folder after any error, for callers whose runs are too short to be resumed."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error.__cause__, FileExistsError):  # then the result is whole, but someone has created `out`
            writer.discard()
        raise
    finally:
        writer.close()


def _with_digests(files: dict[str, Any], digests: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`files` with the digests in config.json, and the metadata of weight files; of folders of ours only."""
    config = files.get("config.json", {})
    if config.get("quantization_config", {}).get("quant_method") != QUANT_METHOD:
        return files, {}
    quantization = config["quantization_config"] | digests
    metadata = {key: digests[name] for name, key in DIGESTS.items() if name in digests}
    return files | {"config.json": config | {"quantization_config": quantization}}, metadata


def _add_proofs(folder: Path) -> None:
    """Write the proofs of all matrices into a folder that is complete but for them, and their digest into config.json.

    What a reader makes of the folder is proved, not what the writer meant to write. Matrices with NaN or infinity, as
    some models have in rows of the embedding that nobody reads, get no proof.
    """
    reader, place = Reader(folder, most_bytes=1 << 25), folder / PROOFS_FILE  # a run has memory for a layer
    quantization = reader.config["quantization_config"]
    schema = reader.schema.model_copy(update={"proofs": Proofs(seed=SEED, digest="0" * 64)})
    found = {name: proof for name, proof in reader.proved(schema) if proofs.check(proof) is None}
    quantization["proofs"] = Proofs(seed=SEED, digest=proofs.digest(found)).model_dump()
    place.parent.mkdir()
    save_file({f"{name}{proofs.PROOF_SUFFIX}": tensor for name, tensor in found.items()}, place)
    (folder / "config.json").write_text(json.dumps(reader.config, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

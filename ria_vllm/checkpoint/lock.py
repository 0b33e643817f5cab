"""One owner at a time of a folder that others may make, lock and delete at any moment."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from ria_vllm.errors import RiaError

LOCK_FILE = "lock"
ATTEMPTS = 100  # to lock a folder that others delete meanwhile


def is_free(folder: Path, sign: str) -> bool:
    """Whether a folder is missing, or empty but for a lock, or holds what shows that it is ours.

    Args:
        sign: a file's name, or a folder's with a "/". Who locks the folder makes this first and deletes it last, so
            that the answer is right meanwhile, too.
    """
    try:
        with os.scandir(folder) as entries:
            names = {entry.name + "/" * entry.is_dir() for entry in entries}
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    return sign in names or names <= {LOCK_FILE, f"{sign}.tmp"}


def locked(folder: Path) -> IO[bytes]:
    """An open file, by which this process has the folder to itself until it is closed or the process ends. The folder
    is made if it is not there.

    The lock is the process's: any other descriptor of the file that it closes ends it, too.

    Raises:
        RiaError: another process has it.
        OSError: it cannot be made.
    """
    for _ in range(ATTEMPTS):
        with suppress(FileExistsError, FileNotFoundError):  # another process is deleting it
            return _locked(folder)
    return _locked(folder)


def _locked(folder: Path) -> IO[bytes]:
    """One attempt. FileExistsError or FileNotFoundError may mean that another process has deleted the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    file = open(path, "ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise RiaError(
                f"{folder}: another process is writing here. Wait until it ends, or choose another output folder."
            ) from error
        # The file system has no locks.
    try:
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        file.close()  # who had the lock has deleted it: it keeps nobody out
        raise


def delete_locked(folder: Path, lock: IO[bytes]) -> None:
    """Delete a folder that `locked` has locked, and that is empty but for the lock; else only unlock it.

    The lock is deleted while it is held. So who waits for it, or comes now, makes one of its own.
    """
    (folder / LOCK_FILE).unlink(missing_ok=True)
    lock.close()  # NFS keeps a file that is open under another name, and then the folder, too
    with suppress(OSError):  # another process has it by now
        folder.rmdir()

"""`ria-vllm push` uploads a compressed folder to the Hugging Face Hub in one commit: it appears whole or not at all."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import click

from ria_vllm.checkpoint.companions import companions
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.weight_files import INDEX_FILE
from ria_vllm.errors import RiaError, printable
from ria_vllm.files.sizes import human_size
from ria_vllm.format.schema import PERMUTATIONS_FILE, PROOFS_FILE, REPORT_FILE, ROTATIONS_FILE
from ria_vllm.hub.model_card import CARD_FILE, SERVE_HERE
from ria_vllm.progress import Monitor


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option(
    "--revision", default="main", show_default=True, help="The branch to write to; created if it does not exist."
)
def push(out: Path, repository: str, private: bool, revision: str) -> None:
    """Upload the compressed checkpoint OUT to the Hugging Face Hub, as REPO (USER/NAME).

    Checks OUT as `verify` does. Creates REPO if it does not exist. The same commit deletes weight files of an older
    model there that OUT does not have. Needs `hf auth login`.
    """
    files = files_to_push(checked(out))
    for name, path in files.items():
        click.echo(f"  {printable(name):40} {human_size(path.stat().st_size)}")
    tops = {PurePosixPath(name).parts[0] for name in files}
    left_out = sorted(path.name for path in out.iterdir() if path.name not in tops)
    if left_out:
        click.echo(f"not part of the checkpoint, stays here: {printable(', '.join(left_out))}")
    click.echo(printable(upload(files, repository, private, revision)))


def checked(out: Path) -> Reader:
    """A reader of the folder, in which `verify` finds no problem.

    Raises:
        RiaError: it is not a finished compressed folder, or `verify` finds a problem.
    """
    if out.resolve().name.endswith(".partial"):
        raise RiaError(f"{out}: the work folder of an unfinished run. Finish it first (--resume).")
    reader = Reader(out)
    monitor = Monitor()
    with monitor.live():
        problem = next(reader.problems(monitor), None)
    if problem is not None:
        raise RiaError(
            f"{out}: nothing was uploaded. The first problem: {problem}. `ria-vllm verify` lists all. Compress the "
            "model again, or get the damaged files again."
        )
    return reader


def files_to_push(reader: Reader) -> dict[str, Path]:
    """The checkpoint's files by their names: weights, card, and the companion files that `compress` copies.

    Raises:
        RiaError: one of them is a link to something outside the folder.
    """
    folder = reader.folder
    names = {path.name for path in reader.files.values()} | {"config.json", REPORT_FILE, CARD_FILE, INDEX_FILE}
    names |= {PERMUTATIONS_FILE} | ({ROTATIONS_FILE} if reader.rotations else set())
    names |= {PROOFS_FILE} if reader.schema.proofs else set()
    own = [folder / name for name in sorted(names) if (folder / name).is_file()]
    found = {path.relative_to(folder).as_posix(): path for path in own + companions(folder)}
    snapshot = folder.resolve().parent
    roots = (folder.resolve(), *([snapshot.parent / "blobs"] if snapshot.name == "snapshots" else []))
    for path in found.values():  # another cached model may be private
        if not any(path.resolve().is_relative_to(root) for root in roots):
            name = printable(str(path))
            raise RiaError(f"{name}: a link that leads out of the folder. Copy the file itself there, or remove it.")
    return found


def upload(files: Mapping[str, Path], repository: str, private: bool, revision: str) -> str:
    """Create the repository if it does not exist, and commit the files.

    Returns:
        The URL of what was written.

    Raises:
        RiaError: the Hub refuses something, or the connection fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise RiaError("push: not logged in to the Hugging Face Hub. Run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        repository = url.repo_id  # with the user's name if it was left out
        if private and not api.repo_info(repository).private:
            raise RiaError(
                f"{repository}: exists already and is public. Change that on the Hub or choose another name."
            )
        if revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        stale = sorted(set(filter(_is_weights, api.list_repo_files(repository, revision=revision))) - set(files))
        if stale:
            click.echo(f"weights of an older model, deleted there: {printable(', '.join(stale))}")
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, _content(path, repository)) for name, path in files.items()]
        message = "Upload a model pruned by ria-vllm"
        api.create_commit(repository, operations, commit_message=message, revision=revision)
        # A .gitignore in the repository makes the Hub skip files silently.
        missing = sorted(set(files) - set(api.list_repo_files(repository, revision=revision)))
    except RiaError:
        raise
    except Exception as error:  # from httpx, hf_xet or huggingface_hub itself
        causes = (str(cause) or type(cause).__name__ for cause in (error, error.__cause__) if cause is not None)
        said = " ".join(": ".join(causes).split())[:400]
        raise RiaError(
            f"{repository}: the upload failed ({said}). Check the name, the network and the token (`hf auth login`), "
            "and run the same command again; it sends only what is missing."
        ) from error
    if missing:
        raise RiaError(f"{repository}: the Hub did not take {', '.join(missing)}. Does a .gitignore there name them?")
    return f"{url}/tree/{revision}"


def _is_weights(name: str) -> bool:
    """Whether a reader would load this file of the repository as weights, along with ours."""
    return PurePosixPath(name).name == name and (name.endswith(".safetensors") or name == INDEX_FILE)


def _content(path: Path, repository: str) -> Path | bytes:
    """What is uploaded for a file: the file, except that in the card the `vllm serve` line names the repository."""
    if path.name != CARD_FILE:
        return path
    lines = path.read_bytes().split(b"\n")
    return b"\n".join(f"vllm serve {repository}".encode() if line == SERVE_HERE.encode() else line for line in lines)

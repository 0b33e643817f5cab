"""`ria-vllm push` uploads a compressed folder to the Hugging Face Hub in one commit: it appears whole or not at all."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import click

from ria_vllm.checkpoint.companions import is_companion, nested_companions
from ria_vllm.checkpoint.reader import Reader, is_compressed
from ria_vllm.checkpoint.weight_files import INDEX_FILE
from ria_vllm.errors import RiaError, printable
from ria_vllm.files.sizes import human_size
from ria_vllm.format.schema import PERMUTATIONS_FILE, PROOFS_FILE, ROTATIONS_FILE
from ria_vllm.hub.model_card import CARD_FILE, SERVE_HERE
from ria_vllm.progress import Monitor


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--revision", help="The branch to write to; created if it does not exist.  [default: main]")
@click.option("--commit-message", help="[default: Upload a model pruned to 2:4 by ria-vllm]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of writing to the branch.")
def push(
    out: Path, repository: str, private: bool, revision: str | None, commit_message: str | None, create_pr: bool
) -> None:
    """Upload the compressed checkpoint OUT to the Hugging Face Hub, as REPO (USER/NAME).

    Checks OUT as `verify` does. Creates REPO if it does not exist. The same commit deletes weight files of an older
    model there that OUT does not have. Needs `hf auth login`.
    """
    if create_pr and revision:
        raise RiaError("push: give --revision or --create-pr, not both. A pull request goes to the main branch.")
    reader = checked(out)
    files = files_to_push(reader)
    for name, path in files.items():
        click.echo(f"  {printable(name):40} {human_size(path.stat().st_size)}")
    tops = {PurePosixPath(name).parts[0] for name in files}
    left_out = sorted(path.name for path in out.iterdir() if path.name not in tops)
    if left_out:
        click.echo(f"not part of the checkpoint, stays here: {printable(', '.join(left_out))}")
    message = commit_message or "Upload a model pruned to 2:4 by ria-vllm"
    click.echo(printable(upload(files, repository, Target(private, revision, message, create_pr))))


def checked(out: Path) -> Reader:
    """A reader of the folder, in which `verify` finds no problem.

    Raises:
        RiaError: it is not a finished compressed folder, or `verify` finds a problem.
    """
    if out.resolve().name.endswith(".partial"):
        raise RiaError(f"{out}: the work folder of an unfinished run. Finish it first (--resume).")
    if (out / "config.json").is_file() and not is_compressed(out):
        raise RiaError(f"{out}: not a compressed folder. `hf upload REPO {out}` uploads a plain dense one.")
    reader = Reader(out)
    monitor = Monitor()
    with monitor.live():
        problems = list(reader.problems(monitor))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise RiaError(
            f"{out}: {count}, nothing was uploaded. The first: {problems[0]}. `ria-vllm verify` lists all. "
            "Compress the model again, or get the damaged files again."
        )
    return reader


def files_to_push(reader: Reader) -> dict[str, Path]:
    """The checkpoint's files by their names: weights, card, and the companion files that `compress` copies.

    Raises:
        RiaError: one of them is a link to something outside the folder.
    """
    folder = reader.folder
    own = {path.name for path in reader.files.values()} | {CARD_FILE, INDEX_FILE, PERMUTATIONS_FILE}
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and (path.name in own or is_companion(path))]
    files += nested_companions(folder)
    files += [folder / ROTATIONS_FILE] if reader.rotations else []
    files += [folder / PROOFS_FILE] if reader.schema.proofs else []
    for path in files:
        if path.resolve().parent != folder.resolve() / path.parent.relative_to(folder):
            raise RiaError(f"{path}: a link that leads out of the folder. Copy the file itself there, or remove it.")
    return {path.relative_to(folder).as_posix(): path for path in files}


@dataclass(frozen=True)
class Target:
    private: bool = False
    revision: str | None = None
    message: str = "Upload"
    create_pr: bool = False


def upload(files: Mapping[str, Path], repository: str, target: Target) -> str:
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
    revision = target.revision or "main"
    names = set(files)
    try:
        url = api.create_repo(repository, private=target.private or None, exist_ok=True)
        repository = url.repo_id  # with the user's name if it was left out
        if target.private and not api.repo_info(repository).private:
            raise RiaError(
                f"{repository}: exists already and is public. Change that on the Hub or choose another name."
            )
        if target.revision is not None and not target.revision.startswith("refs/pr/"):
            api.create_branch(repository, branch=target.revision, exist_ok=True)
        stale = [name for name in api.list_repo_files(repository, revision=revision) if _is_weights(name)]
        stale = sorted(set(stale) - names)
        if stale:
            click.echo(f"weights of an older model, deleted there: {printable(', '.join(stale))}")
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, _content(path, repository)) for name, path in files.items()]
        found = api.create_commit(
            repository,
            operations,
            commit_message=target.message,
            revision=target.revision,
            create_pr=target.create_pr,
        )
        # A .gitignore in the repository makes the Hub skip files silently.
        there = set(api.list_repo_files(repository, revision=found.pr_revision or revision))
    except RiaError:
        raise
    except Exception as error:  # from httpx, hf_xet or huggingface_hub itself
        raise RiaError(f"{repository}: {_reason(error)}") from error
    if names - there:
        raise RiaError(
            f"{repository}: the Hub did not take {', '.join(sorted(names - there))}. Does a .gitignore there name them?"
        )
    if found.pr_url:
        return found.pr_url
    return str(url) if revision == "main" else f"{url}/tree/{revision}"


def _is_weights(name: str) -> bool:
    """Whether a reader would load this file of the repository as weights, along with ours."""
    return PurePosixPath(name).name == name and (name.endswith(".safetensors") or name == INDEX_FILE)


def _content(path: Path, repository: str) -> Path | bytes:
    """What is uploaded for a file: the file, except that in the card the `vllm serve` line names the repository."""
    if path.name != CARD_FILE:
        return path
    lines = path.read_bytes().split(b"\n")
    return b"\n".join(f"vllm serve {repository}".encode() if line == SERVE_HERE.encode() else line for line in lines)


def _reason(error: Exception) -> str:
    """One line about an error of huggingface_hub, with what to do about it."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    said = re.sub(r" For more information check: \S+", "", " ".join(str(error).split()))[:300] or type(error).__name__
    if status == 401:
        return "the Hub does not accept your token. Run `hf auth login` again."
    if status == 403:
        return f"your token may not write there ({said}). Run `hf auth login` with one that may."
    if status == 404:
        return f"the Hub does not find it ({said}). Check the name and the revision."
    if status == 409:
        return f"the Hub says that something else is changing the repository ({said}). Run the same command again."
    if status is not None and status >= 500:
        return (
            f"the Hub failed with {status} ({said}). Run the same command again later; it sends only what is missing."
        )
    return f"the upload failed ({said}). Check the name and the network, and run the same command again."

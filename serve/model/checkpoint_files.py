"""What must be known about a checkpoint before its weights stream in: a local folder, or on the hub."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import vllm.envs as envs

from ria_vllm.checkpoint.consistency import check_digests, check_file_digest
from ria_vllm.checkpoint.side_files import load_permutations
from ria_vllm.checkpoint.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    file_metadata,
    files_below,
    mistral_files,
    read_index,
    tensor_names,
    unindexed_files,
    weight_files,
    weights_among,
)
from ria_vllm.errors import RiaError
from ria_vllm.format.int8_rows import INTEGERS
from ria_vllm.format.schema import PERMUTATIONS_FILE, RiaSchema

# Types of errors, of several HTTP libraries, that say that no server has answered.
NO_ANSWER = ("ConnectionError", "TimeoutError", "Timeout", "TransportError")


class OutOfReach(RiaError):
    """A file cannot be got from the hub, for any reason but that there is none."""


class Offline(OutOfReach):
    """The hub cannot be reached, or must not be (HF_HUB_OFFLINE), and its cache does not have the file."""


def is_offline(error: BaseException) -> bool:
    """Whether an error of the hub's library says that the hub is not there; otherwise it has refused something.

    It is not there either if it is down or asks to come back later. The hub's library then takes cached files, too.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return error.__cause__ is None or is_offline(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status == 429 or status >= 500
    return any(base.__name__ in NO_ANSWER for base in type(error).__mro__)


def _reason(error: BaseException) -> str:
    """What has happened; the hub's library says of a file that could not be got only that it is not in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error
    return " ".join(str(error).split()) or type(error).__name__


def _failure(error: BaseException, what: str, way_out: str = "") -> OutOfReach:
    """The error to raise where the hub's library has raised one; `way_out`: what helps where the hub is not there."""
    offline = is_offline(error)
    kind = Offline if offline else OutOfReach
    return kind(f"{what} ({_reason(error)}).{way_out if offline else ''}")


def locate(model: str, name: str, revision: str | None) -> Path | None:
    """The file `name` of a local folder, or of a repository on the hub, downloaded into the cache.

    Returns:
        None if the folder or the repository has no such file.

    Raises:
        OutOfReach: the hub refuses it; Offline: it cannot be reached and the file is not in the cache.
        RiaError: it is on ModelScope.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    if envs.VLLM_USE_MODELSCOPE:
        raise RiaError(f"{model}: download it from ModelScope first, and give the local folder.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        in_cache_only = isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, EntryNotFoundError) and not in_cache_only:
            return None
        if in_cache_only and is_offline(error):
            raise Offline(
                f"{model}: {name} is not in the local cache and the hub cannot be reached. Download the whole "
                "repository first, or give a local folder."
            ) from None
        raise _failure(error, f"{model}: cannot get {name} from the hub") from error


def is_fixed(model: str, revision: str | None) -> bool:
    """Whether `revision` is a commit of a repository on the hub, whose files never change.

    vLLM 0.32 finds out the commit of a branch once, and passes it on with the branch's name.
    """
    commit = getattr(revision, "resolved", revision)
    return not Path(model).is_dir() and re.fullmatch("[0-9a-f]{40}", str(commit)) is not None


class WeightHeaders:
    """What the headers of a model's weight files say: of those that vLLM loads, which are all where there is no index.

    Of files that are on the hub and not in its cache, only the header is fetched. vLLM downloads the rest, perhaps into
    another cache (`--download-dir`).

    Attributes:
        names: of all tensors; None without weight files, as `--load-format dummy` takes a model.
        files: names of the weight files.
        mistral: why vLLM would read others than an index names, with `--load-format auto`; None if it would not.
    """

    def __init__(self, model: str, revision: str | None):
        """Read the names of the tensors.

        Raises:
            RiaError: a file is missing or damaged, two hold the same tensor, or vLLM would read other files than these
                in any case; OutOfReach if a file cannot be read.
        """
        self.model = model
        self.revision = revision
        self.names: list[str] | None = None
        self.files: list[str] = []
        self.mistral: str | None = None
        self._headers: dict[str, tuple[list[str], Mapping[str, str]]] = {}
        self._listed: list[str] | None = None
        index = self._index()
        if index is None:
            self._read_unindexed()
            return
        shards = read_index(index, model)
        self.mistral = mistral_files(self._all_files(), shards.values(), model)
        if self.mistral is not None:
            self.mistral += " Or serve it with --load-format safetensors."
        if Path(model).is_dir():
            if not any((Path(model) / file).is_file() for file in set(shards.values())):
                return
            weight_files(Path(model))
        self.names, self.files = list(shards), sorted(set(shards.values()))

    def _read_unindexed(self) -> None:
        found: dict[str, str] = {}
        self.files = self._unindexed()
        if taken := mistral_files(self._all_files(), self.files, self.model):
            raise RiaError(taken)  # with another load format, vLLM reads them together with the model's own
        _check_complete(self.files, self.model)
        for file in self.files:
            for name in self._header(file)[0]:
                other = found.setdefault(name, file)
                if other != file:
                    raise RiaError(
                        f"{self.model}: {name} is in {other} and in {file}, and vLLM loads both, because there is no "
                        f"{INDEX_FILE}. Remove the one that does not belong there."
                    )
        self.names = list(found) if self.files else None

    def metadata(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """(file, the `__metadata__` of its header) of each weight file."""
        for file in self.files:
            yield f"{self.model}: {file}", self._header(file)[1]

    def _index(self) -> Path | None:
        try:
            return locate(self.model, INDEX_FILE, self.revision)
        except Offline:
            if weights_among(self._in_cache()):
                return None  # the cache has the weights of a repository without an index
            raise

    def _unindexed(self) -> list[str]:
        """Names of all weight files."""
        if Path(self.model).is_dir():
            return unindexed_files(Path(self.model))
        return weights_among(self._all_files())

    def _all_files(self) -> list[str]:
        """Paths of all files of the folder or repository."""
        if Path(self.model).is_dir():
            return files_below(Path(self.model))
        if self._listed is None:
            try:
                self._listed = self._list()
            except Exception as error:  # as in `_header`
                found = self._in_cache()
                if not is_offline(error) or not found:
                    raise self._out_of_reach("the list of its files", error) from error
                self._listed = found
        return self._listed

    def _list(self) -> list[str]:
        from huggingface_hub import list_repo_files

        return list(list_repo_files(self.model, revision=self.revision))

    def _in_cache(self) -> list[str]:
        """Paths of the repository's files that are in the hub's cache."""
        path = self._cached("config.json") or self._cached(INDEX_FILE) or self._cached(SINGLE_FILE)
        return [] if path is None else [name for name in files_below(path.parent) if self._cached(name)]

    def _cached(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.model, file, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def _header(self, file: str) -> tuple[list[str], Mapping[str, str]]:
        """Names of the tensors of a weight file, and its metadata. It is read once."""
        if file not in self._headers:
            self._headers[file] = self._read_header(file)
        return self._headers[file]

    def _read_header(self, file: str) -> tuple[list[str], Mapping[str, str]]:
        path = Path(self.model) / file if Path(self.model).is_dir() else self._cached(file)
        if path is not None:
            return tensor_names(path), file_metadata(path)
        from huggingface_hub import parse_safetensors_file_metadata

        try:
            header = parse_safetensors_file_metadata(self.model, file, revision=self.revision)
        except Exception as error:  # the hub's library and HTTP raise a dozen types if it is out of reach
            raise self._out_of_reach(f"the header of {file}", error) from error
        return list(header.tensors), header.metadata or {}

    def _out_of_reach(self, what: str, error: Exception) -> OutOfReach:
        way_out = (
            " Download the whole repository first. If it is not in the hub's own cache (--download-dir), give its "
            "local folder."
        )
        return _failure(error, f"{self.model}: {what} cannot be read from the hub", way_out)


def _check_complete(files: Sequence[str], model: str) -> None:
    """Check that all shards are there, by the numbers in their names.

    Raises:
        RiaError: some are missing.
    """
    shards = [found for file in files if (found := re.fullmatch(r"(.*)-[0-9]+-of-([0-9]{1,6})\.safetensors", file))]
    for (stem, total), count in Counter(shard.groups() for shard in shards).items():
        if count != int(total):
            raise RiaError(
                f"{model}: {count} of the {int(total)} files {stem}-*-of-{total}.safetensors, and no {INDEX_FILE}. Get "
                "the others and the index, or remove these if they are of another model."
            )


def stored_modules(names: list[str]) -> dict[str, bool]:
    """Module with a weight -> whether it is stored compressed. `names`: of tensors."""
    found = {name.rpartition(".")[0]: False for name in names if name.endswith((".weight", f".{INTEGERS}"))}
    return found | {name.removesuffix(".compressed"): True for name in names if name.endswith(".compressed")}


def dense_tensors(names: Iterable[str]) -> set[str]:
    """Those of the tensors called `names` that store no pruned weight; biases of pruned linears are among them."""
    names = list(names)
    pruned = {name.removesuffix(".compressed") for name in names if name.endswith(".compressed")}
    return {name for name in names if name.endswith(".bias") or name.rpartition(".")[0] not in pruned}


def permutations_of(model: str, revision: str | None, schema: RiaSchema) -> dict[str, np.ndarray]:
    """Linear -> int32 [in], the permutations of a checkpoint, checked against the digest in `schema`.

    Raises:
        RiaError: they are missing or damaged, or belong to another run than config.json.
    """
    if not schema.permutes:
        # A stray file does no harm here, because it is not read; `verify` reports it.
        check_digests(schema, {}, (), model)
        return {}
    path = locate(model, PERMUTATIONS_FILE, revision)
    if path is None:
        raise RiaError(
            f"{model}: {PERMUTATIONS_FILE} is missing, though the model was compressed with permutations. Get the file "
            "again."
        )
    permutations = load_permutations(path)
    check_digests(schema, permutations, (), model)
    return {name: p.int().numpy() for name, p in permutations.items()}


def check_weight_files(headers: WeightHeaders, schema: RiaSchema) -> None:
    """Check that every weight file is stored under the permutations that `schema` names."""
    for where, metadata in headers.metadata():
        check_file_digest(schema, metadata, where)

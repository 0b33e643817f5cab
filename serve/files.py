"""The few facts about a checkpoint that must be known before its weights stream in, local or on the hub."""

from pathlib import Path

import numpy as np

from ria_vllm import permutation
from ria_vllm.checkpoint import INDEX_FILE, SINGLE_FILE, load_tensor, read_json, tensor_names, weight_files
from ria_vllm.errors import RiaError
from ria_vllm.schema import PERMUTATIONS_FILE

SUFFIX = ".input_permutation"


def locate(model: str, name: str, revision: str | None) -> Path | None:
    """The file `name` of a local folder or of a hub repository (downloaded into the hub's cache); None if it has none.

    Raises:
        RiaError: the hub cannot be reached and the file is not in the cache.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError:
        raise RiaError(
            f"{model}: {name} is not in the local cache and the hub cannot be reached. Download the whole repository "
            "first, or give a local folder."
        ) from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise RiaError(f"{model}: cannot get {name} from the hub ({error}).") from error


def stored_modules(model: str, revision: str | None) -> dict[str, bool] | None:
    """Module with a weight -> whether it is stored compressed; None where only the weight files themselves could tell.

    That is so for a hub repository of a single weight file, which is not fetched for this, and for a folder without
    weights (`--load-format dummy`).
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
            return None
        names = list(weight_files(folder))
    else:
        try:
            index = locate(model, INDEX_FILE, revision)
        except RiaError:
            return None  # offline, and the cache has no index: a single file
        if index is None:
            return None
        names = list(read_json(index).get("weight_map") or ())
    found = {name.removesuffix(".weight"): False for name in names if name.endswith(".weight")}
    return found | {name.removesuffix(".compressed"): True for name in names if name.endswith(".compressed")}


def read_permutations(path: Path) -> dict[str, np.ndarray]:
    """Linear's name -> int32 [in], each a permutation of 0..in-1.

    Raises:
        RiaError: file and layer named.
    """
    found = {}
    for stored in tensor_names(path):
        name = stored.removesuffix(SUFFIX)
        p = load_tensor(path, stored)
        wrong = "an unknown name" if name == stored else permutation.check(p, p.numel())
        if wrong:
            raise RiaError(f"{path}: {stored}: not a permutation: {wrong}. Get the file again.")
        found[name] = p.int().numpy()
    return found


def permutations_of(model: str, revision: str | None, expected: bool) -> dict[str, np.ndarray]:
    """The permutations of a checkpoint; `expected`: its config says that it was compressed with some."""
    try:
        path = locate(model, PERMUTATIONS_FILE, revision)
    except RiaError:
        if expected:
            raise
        return {}  # offline, and the cache has what there is
    if path is not None:
        return read_permutations(path)
    if expected:
        raise RiaError(
            f"{model}: {PERMUTATIONS_FILE} is missing, though the model was compressed with permutations. "
            "Get the file again."
        )
    return {}

"""The weight files of a Hugging Face folder: which they are, and which tensors they hold. No weight is read."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format.schema import PERMUTATIONS_FILE

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LONGEST_NAME = 1000


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single weight file of a Hugging Face folder.

    Raises:
        RiaError: no weights; a shard that is missing, truncated or outside the folder; a tensor missing from its shard.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / SINGLE_FILE).is_file():
            shards = unindexed_files(folder)
            beside = f" There is {shards[0]}: if it is a shard of this model, get {INDEX_FILE}, too." if shards else ""
            raise RiaError(f"{folder}: no weights here (neither {SINGLE_FILE} nor {INDEX_FILE}).{beside}")
        return dict.fromkeys(tensor_names(folder / SINGLE_FILE), folder / SINGLE_FILE)
    weight_map = read_index(index, folder)
    present: dict[str, set[str]] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            lost = next(name for name, shard in weight_map.items() if shard == file)
            beside = f" If {SINGLE_FILE} is the model, remove {INDEX_FILE}." if (folder / SINGLE_FILE).is_file() else ""
            raise RiaError(f"{folder / file}: shard missing (it holds {lost}). Get the file again.{beside}")
        present[file] = set(tensor_names(folder / file))
    for name, file in weight_map.items():
        if name not in present[file]:
            raise RiaError(f"{folder / file}: tensor {name} missing, though the index names it. Get the file again.")
    return {name: folder / file for name, file in weight_map.items()}


def unindexed_files(folder: Path) -> list[str]:
    """Names of the files that vLLM takes for a folder's weights where there is no index, sorted."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    return [name for name in names if not name.startswith(".") and name != PERMUTATIONS_FILE]


def read_index(path: Path, where: str | Path) -> dict[str, str]:
    """Tensor name -> name of its shard, from an index of weight files; `where` names the folder or repository.

    Raises:
        RiaError: the index is damaged, or names a shard outside the folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise RiaError(f"{where}: no usable weight_map in {INDEX_FILE}. Get the file again.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.isprintable() or len(file.encode()) > 255:
            raise RiaError(
                f"{where}: {INDEX_FILE}: shard {file!r} lies outside the folder. Do not use this checkpoint."
            )
    return weight_map


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        RiaError: the file is truncated or broken, or a name cannot be printed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise RiaError(f"{path}: broken or truncated safetensors file ({error}). Get the file again.") from None
    for name in names:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise RiaError(f"{path}: {name[:80]!r} is not a valid tensor name. Do not use this checkpoint.")
    return names


def file_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file's header; empty where it has none."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RiaError(f"{path}: broken or truncated safetensors file ({error}). Get the file again.") from None

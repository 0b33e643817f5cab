"""Which weights of a dense model's folder are meant. Where the programs that read it could disagree, it is refused."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from ria_vllm.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE, tensor_names, unindexed_files, weight_files
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json

ADAPTER_CONFIG = "adapter_config.json"
PICKLED = "pytorch_model*.bin"
NAMED_WEIGHTS = "transformers_weights"  # in config.json: the file that transformers reads
CONVERT = (
    "load the model with transformers and save it (model.save_pretrained); or, on the hub, let "
    "https://huggingface.co/spaces/safetensors/convert do it"
)
# Old Llama checkpoints contain it, though it follows from the configuration. It is not written.
LEFT_OUT = "rotary_emb.inv_freq"


def meant_weights(folder: Path, model: str) -> dict[str, Path]:
    """Tensor name -> file, for all tensors of the one model that a folder holds.

    Args:
        model: what the user called it, the folder or a hub id, for errors.

    Raises:
        RiaError: see `find_tensors`; or all weights are pickled, or transformers would read others than vLLM, for an
            adapter beside them or because config.json names them.
    """
    unknown = "which vLLM does not, so it is unknown which model is meant. Load the right one with transformers, and"
    file = read_json(folder / "config.json").get(NAMED_WEIGHTS)
    if file not in (None, SINGLE_FILE, INDEX_FILE):
        raise RiaError(
            f"{model}: transformers would read {str(file)[:80]!r}, which config.json names as {NAMED_WEIGHTS}, "
            f"{unknown} save it with save_pretrained."
        )
    if not (folder / INDEX_FILE).is_file() and not unindexed_files(folder):
        refuse_pickled(model, (path.name for path in folder.iterdir()))
    files = find_tensors(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise RiaError(
            f"{model}/{ADAPTER_CONFIG}: transformers adds this adapter to the weights, {unknown} merge it "
            "(merge_and_unload); or move the adapter out of the folder."
        )
    return files


def refuse_pickled(model: str, files: Iterable[str]) -> None:
    """Refuse a model without safetensors of which one of these files holds pickled weights.

    Args:
        model: the folder or hub id, for errors.
        files: paths of its files.
    """
    pickled = sorted(file for file in files if fnmatchcase(file, PICKLED))
    if pickled:
        raise RiaError(
            f"{model}: only {pickled[0]} here. Pickled weights are not opened, because they can run code. Convert them "
            f"to safetensors: {CONVERT}."
        )


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for all tensors in the weight files, whether or not the index names them.

    Raises:
        RiaError: see `weight_files`; or two files hold tensors of one name, or there are shards and a single file.
    """
    files = weight_files(folder)
    single = folder / SINGLE_FILE
    if single.is_file() and single not in files.values():
        raise RiaError(
            f"{single}: transformers would read this file, and vLLM the shards that {INDEX_FILE} names, so it is "
            "unknown which model is meant. Remove this file, or the index and its shards."
        )
    for path in sorted(set(files.values())):
        for name in tensor_names(path):
            first = files.setdefault(name, path)
            if first != path:
                raise RiaError(
                    f"{path}: {name} is in {first.name}, too, and nothing says which is right. Get the model again."
                )
    return files

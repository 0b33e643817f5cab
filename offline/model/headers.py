"""A folder that stands in for a model on the hub: its config.json, and weight files with nothing but headers.

The values are holes in the files: they read as zeros and take no space. What does not depend on them can be found out.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

from ria_vllm.checkpoint.weight_files import INDEX_FILE
from ria_vllm.checkpoint.writer import disk_errors
from ria_vllm.errors import RiaError
from ria_vllm.files.fetching import hub_errors


@contextmanager
def without_weights(model: str) -> Iterator[Path]:
    """The folder of a model: its own or, of a hub id, one made from what a few small requests say; it is removed.

    Raises:
        RiaError: a single file, or neither a folder nor on the hub with its weights in safetensors.
    """
    if Path(model).is_dir():
        yield Path(model)
        return
    if Path(model).exists():
        raise RiaError(f"{model}: plan reads Hugging Face folders and hub ids. `compress` takes this file as it is.")
    from huggingface_hub import HfApi

    with hub_errors(model, f"{model}: no such folder here"):
        config, found = HfApi().hf_hub_download(model, "config.json"), HfApi().get_safetensors_metadata(model)
    with TemporaryDirectory(prefix="ria-plan-") as scratch:
        folder, places = Path(scratch, *model.split("/")), {}
        with disk_errors(folder):
            folder.mkdir(parents=True)
            copyfile(config, folder / "config.json")
            # As many files as there: a system may refuse to map one that is larger than its memory.
            for number, described in enumerate(found.files_metadata.values()):
                header, end, written = {}, 0, f"model-{number:05d}.safetensors"
                for name, info in described.tensors.items():
                    begin, end = end, end + max(0, info.data_offsets[1] - info.data_offsets[0])
                    header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [begin, end]}
                    places[name] = written
                text = json.dumps(header).encode()
                with open(folder / written, "wb") as file:
                    file.write(len(text).to_bytes(8, "little") + text)
                    file.truncate(8 + len(text) + end)
            (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
        yield folder

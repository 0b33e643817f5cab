"""The model to compress: a Hugging Face folder or a hub id."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ria_vllm.checkpoint.companions import companions
from ria_vllm.checkpoint.inputs import Inputs, Stamps
from ria_vllm.checkpoint.reader import is_compressed
from ria_vllm.checkpoint.weight_files import INDEX_FILE, unindexed_files
from ria_vllm.compressed_tensors.config import quantization_places
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.offline.model.files.dequantize import scheme_of
from ria_vllm.offline.model.files.which_weights import NAMED_WEIGHTS, PICKLED, meant_weights
from ria_vllm.offline.model.run.architecture import model_class
from ria_vllm.offline.model.run.hf import commit_of, from_hub, reason_of, without_quantization
from ria_vllm.progress import Monitor

FOLDER = "Give a Hugging Face folder or a hub id."
GGUF = f"GGUF files are not read: their weights are rounded. {FOLDER}"


@dataclass(frozen=True)
class Source:
    """A checked folder. `name` is what the user called it; `raw_config` is the content of config.json.

    Neither `config` nor `raw_config` says how the weights are quantized in the files, and `raw_config` does not name
    these files.

    config_digest: of what config.json says, all of it.
    inputs: what tells whether the files are still those that were opened.
    revision: the commit of a hub id's files.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    raw_config: dict[str, Any]
    config_digest: str
    inputs: Inputs
    revision: str | None = None

    @property
    def stamps(self) -> Stamps:
        """Those of the files in the folder."""
        return self.inputs.stamps(self.folder)

    def small_files(self) -> dict[str, Path]:
        """Tokenizer, processor, generation config, chat template, license, by their places."""
        return companions(self.folder)


def opened(model: str, monitor: Monitor, inputs: Inputs | None = None) -> Source:
    """Find or fetch the model, and check that it can be compressed.

    Args:
        inputs: those that the run has already; the model becomes one of them before it is read.

    Raises:
        RiaError: the model is missing, damaged or of a kind that cannot be compressed.
    """
    path, inputs = Path(model), Inputs() if inputs is None else inputs
    if path.is_dir():
        inputs.stamps(path)
        source = _checked(model, path, inputs)
        source.small_files()  # so that an error in them shows at once
        return source
    if path.exists():
        raise RiaError(f"{model}: not a folder. {GGUF if path.suffix.lower() == '.gguf' else FOLDER}")
    with monitor.phase("fetching the model from the hub"):
        folder = from_hub(model)
    inputs.stamps(folder)
    return replace(_checked(model, folder, inputs), revision=commit_of(folder))


def _checked(name: str, folder: Path, inputs: Inputs) -> Source:
    raw = read_json(folder / "config.json")
    if is_compressed(folder):
        raise RiaError(f"{name}: already compressed by ria-vllm. Give the original model.")
    digest = sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    for place, key in quantization_places(raw)[1:]:
        if place.get(key):
            raise RiaError(
                f"{name}: config.json says in {'' if place is raw else 'text_config.'}{key} how weights are quantized, "
                f"where compress does not look. Give the original model, or call it quantization_config at the top."
            )
    scheme_of(raw.pop("quantization_config", None), name)
    if not unindexed_files(folder) and not (folder / INDEX_FILE).is_file():
        if any(folder.glob("*.gguf")) and not any(folder.glob(PICKLED)):
            raise RiaError(f"{name}: no safetensors here. {GGUF}")
    meant_weights(folder, name)
    raw.pop(NAMED_WEIGHTS, None)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        path = folder / "config.json"
        raise RiaError(f"{path}: transformers does not know this model ({reason_of(error)}).") from None
    without_quantization(config)
    model_class(name, config)
    return Source(name, folder, config, raw, digest, inputs)

"""Whether files are stored as those that a server was started with, whose permutations it has folded. A running server
may be told to reload others.
"""

from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig

from ria_vllm.checkpoint.consistency import check_file_digest
from ria_vllm.checkpoint.reader import is_compressed
from ria_vllm.checkpoint.side_files import checked_proofs
from ria_vllm.checkpoint.weight_files import file_metadata
from ria_vllm.compressed_tensors.config import is_24_checkpoint, quantization_of
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format import permutation
from ria_vllm.format.schema import PROOFS_FILE, RiaSchema
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.model.checkpoint_files import files_of, folder_of
from ria_vllm.serve.model.config import RiaConfig


def check_reload(config: RiaConfig, built_from: ModelConfig | None, from_files: bool) -> None:
    """Check that a reload brings weights that store the same linears under the same permutations.

    Args:
        config: of the running model.
        built_from: vLLM's configuration of the model when it was built. By now vLLM may have another one.
        from_files: vLLM reads the weights from the model's files; otherwise somebody sends them, by their names.

    Raises:
        RiaError: see `check_files`.
    """
    model_config = EngineOptions.current().model_config or built_from
    if model_config is not None and from_files:
        check_files(config, model_config)


def check_files(config: RiaConfig, model_config: ModelConfig) -> None:
    """The same for the files of a model that vLLM has this configuration of.

    Raises:
        RiaError: the weights are stored differently, or their files do not belong together.
    """
    model = str(model_config.model)
    if Path(model).is_absolute() and not Path(model).exists():
        return  # the weights come from elsewhere, by their names
    folder = folder_of(model, model_config.revision)
    files = files_of(folder)
    if not files:
        return  # as above
    content = read_json(folder / "config.json")
    if not is_compressed(folder) and not is_24_checkpoint(quantization_of(content)):
        raise _refusal(model, "its weights are stored in another form than those that this server was started with")
    new = RiaConfig.from_config(dict(quantization_of(content)))
    if new.compressed_tensors != config.compressed_tensors or _layout(new.schema) != _layout(config.schema):
        raise _refusal(
            model,
            "by its config.json, its weights are stored otherwise than those that this server was started with: in "
            "another format, of other linears, or under other permutations of channels",
        )
    if different := config.awaited(files) ^ config.tensors:
        raise _refusal(model, f"{min(different)} is in the folder or on this server, but not on both")
    for path in sorted(set(files.values())) if config.compressed_tensors is None else ():
        check_file_digest(new.schema, file_metadata(path), path)
    # Scales and rotations are not stored: the permutations, which are the same, tell runs apart.
    changes = new.schema.unlike_dense
    no_permutations = new.schema.permutations_digest in (None, permutation.digest({}))
    if EngineOptions.current().lora and (changes != config.schema.unlike_dense or (changes and no_permutations)):
        raise _refusal(
            model,
            "adapters may not fit its linears, whose inputs may be scaled or rotated (--smooth, --rotate) otherwise",
        )


def proofs_of(config: RiaConfig, model_config: ModelConfig) -> tuple[RiaSchema, dict[str, torch.Tensor]]:
    """The schema of a model's files, and the proof of each matrix; none where ria-vllm did not write them.

    Args:
        config: of the running model.
        model_config: vLLM's configuration of the model whose files were loaded.

    Raises:
        RiaError: the proofs are missing, damaged or of another run.
    """
    if config.compressed_tensors is not None:
        return config.schema, {}
    folder, schema = folder_of(str(model_config.model), model_config.revision), config.schema
    if is_compressed(folder):  # else the user has given vLLM another config.json
        path = folder / "config.json"
        schema = RiaSchema.parse(read_json(path)["quantization_config"], str(path))
    proofs = folder / PROOFS_FILE
    return schema, checked_proofs(proofs if proofs.is_file() else None, schema, str(model_config.model))


def _layout(schema: RiaSchema) -> dict[str, Any]:
    """What a server builds its layers by. The permutations tell runs apart."""
    names = ("pattern", "weight_format", "input_dtype", "folds", "experts", "permutations_digest", "int8_linears")
    return {name: getattr(schema, name) for name in names}


def _refusal(model: str, why: str) -> RiaError:
    return RiaError(f"{model}: {why}. Start a server of that folder anew; this one has begun with other files.")

"""Whether files are stored as those that a server was started with, whose permutations it has folded.

A running server may be told to reload others. And between reading the permutations and the first load, a folder may be
replaced, or a branch on the hub get another state.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from vllm.config import ModelConfig

from ria_vllm.checkpoint.reader import is_compressed
from ria_vllm.checkpoint.side_files import checked_proofs
from ria_vllm.compressed_tensors.config import CompressedTensorsConfig, is_24_checkpoint, quantization_of
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format import permutation, proofs
from ria_vllm.format.schema import PROOFS_FILE, RiaSchema
from ria_vllm.format.weight_format import name_of
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.model.checkpoint_files import (
    WeightHeaders,
    check_weight_files,
    dense_tensors,
    is_fixed,
    locate,
    permutations_of,
    stored_modules,
)
from ria_vllm.serve.model.config import RiaConfig, compressed_tensors_of


def check_reload(config: RiaConfig, built_from: ModelConfig | None, from_files: bool, lora: bool = False) -> None:
    """Check that a reload brings weights that store the same linears in the same channel orders.

    Args:
        config: of the running model.
        built_from: vLLM's configuration of the model when it was built. By now vLLM may have another one.
        from_files: vLLM reads the weights from the model's files; otherwise somebody sends them, by their names.
        lora: the model takes LoRA adapters.

    Raises:
        RiaError: the weights are stored differently, or their files do not belong together.
    """
    if config.unread is not None:
        raise RiaError(
            f"{config.unread} This server was started with dummy weights, which did not need that. Start it again "
            "instead of loading other weights."
        )
    model_config = EngineOptions.current().model_config or built_from
    if model_config is not None and from_files:
        _check_files(config, model_config, permutations=True, lora=lora)


def check_first_load(config: RiaConfig, built_from: ModelConfig | None, lora: bool = False) -> None:
    """Check that the files of a model's first load are still those that `config` was read from.

    Args:
        config: of the model.
        built_from: vLLM's configuration of the model. A draft that is built with the configuration of its target has
            other files, to which nothing here applies.
        lora: the model takes LoRA adapters.

    Raises:
        RiaError: they are not, or do not belong together.
    """
    if built_from is None or str(built_from.model) != config.where or is_fixed(config.where, built_from.revision):
        return
    overrides = getattr(built_from, "hf_overrides", None)
    if isinstance(overrides, Mapping) and "quantization_config" in overrides:
        return  # the user has replaced what the folder says
    _check_files(config, built_from, permutations=False, lora=lora)


def proofs_of(config: RiaConfig, model_config: ModelConfig) -> tuple[RiaSchema, dict[str, torch.Tensor]]:
    """The schema of a model's files, and the proof of each matrix; none where ria-vllm did not write them.

    Args:
        config: of the running model.
        model_config: vLLM's configuration of the model whose files were loaded.

    Raises:
        RiaError: the proofs are missing, damaged or of another run.
    """
    model, revision = str(model_config.model), model_config.revision
    path = locate(_described_in(config, model_config), "config.json", revision)
    if path is None or config.compressed_tensors is not None or not is_compressed(path.parent):
        return config.schema, {}
    schema = RiaSchema.parse(read_json(path)["quantization_config"], str(path))
    found = locate(model, PROOFS_FILE, revision) if schema.proofs is not None else None
    return schema, checked_proofs(found, schema, model)


def _check_files(config: RiaConfig, model_config: ModelConfig, permutations: bool, lora: bool) -> None:
    """Check that the files of a folder or repository store the same linears as `config` has, in the same orders.

    Args:
        model_config: vLLM's configuration of a model with these files.
        permutations: check also that its permutations are there and belong to them. They may be large, and those that
            `config` has are used in any case.
        lora: check also that adapters which fit those also fit these.
    """
    model, revision = str(model_config.model), model_config.revision
    if os.path.isabs(model) and not os.path.exists(model):
        return  # the weights come from elsewhere, by their names
    path = locate(_described_in(config, model_config), "config.json", revision)
    if path is None:
        if _headers(model, revision).names is None:
            return  # as above
        raise RiaError(
            f"{model}: it has weights, but no config.json that says how they are stored. Get config.json of the same "
            "run, too."
        )
    content = read_json(path)
    if config.compressed_tensors is not None:
        _check_compressed_tensors(config, config.compressed_tensors, content, model, revision)
        return
    if not is_compressed(path.parent):
        raise _another_form(model)
    schema = RiaSchema.parse(content["quantization_config"], str(path))
    if permutations:
        permutations_of(model, revision, schema)
        if proofs.wanted():
            proofs_of(config, model_config)
    headers = _headers(model, revision)
    check_weight_files(headers, schema)
    _check_pruned(config, set(headers.names or []), model)
    stored, present_form = _form(schema), _form(config.schema)
    if stored != present_form:
        raise _refusal(model, f"its linears are stored with {stored}, but this server was started with {present_form}")
    orders, present = ((one.permutations_digest, one.folds, one.experts) for one in (schema, config.schema))
    if orders != present:
        raise _refusal(model, "its weights are stored in other channel orders than those that this server has folded")
    _check_dense(config, headers.names, model)
    check_draft(schema, model)
    if lora:
        check_adapters(schema, config.schema, model)


def _described_in(config: RiaConfig, model_config: ModelConfig) -> str:
    """The folder or repository with the config.json of a model's files."""
    model = str(model_config.model)
    elsewhere = getattr(model_config, "hf_config_path", None)  # of the model that the server was started with
    return elsewhere if elsewhere and model == config.where else model


def check_adapters(schema: RiaSchema, present: RiaSchema, model: str) -> None:
    """Check that adapters that fit the folder which this server has loaded also fit another one, `schema`'s.

    Scales and rotations are not stored: the orders of channels tell runs apart.

    Raises:
        RiaError: they may not fit.
    """
    changes = schema.unlike_dense
    if changes != present.unlike_dense or (changes and schema.permutations_digest in (None, permutation.digest({}))):
        raise _refusal(
            model, "its linears may read inputs that are scaled or rotated (--smooth, --rotate) otherwise than here"
        )


def check_draft(schema: RiaSchema, where: str) -> None:
    """Check that the engine's draft, if it reads the target's KV cache, reads no rotated heads. Gemma 4's makes no keys
    and values of its own: it attends to those that its target keeps, and reads the result with an `o_proj` of its own.

    Raises:
        RiaError: it does.
    """
    if EngineOptions.current().draft_reads_cache and "rotate" in schema.unlike_dense:
        raise RiaError(
            f"{where}: heads were rotated (`compress --rotate heads`), and the draft of --speculative-config reads the "
            "values of its target's KV cache as the dense model has them, so its guesses would be wrong. Serve without "
            "--speculative-config, or compress with --rotate none."
        )


def _headers(model: str, revision: str | None) -> WeightHeaders:
    headers = WeightHeaders(model, revision)
    if headers.mistral is not None and EngineOptions.current().takes_mistral:
        raise RiaError(headers.mistral)
    return headers


def _form(schema: RiaSchema) -> str:
    """How the pruned linears of a folder are stored."""
    inputs = schema.input_dtype
    rounded = "unrounded" if inputs is None else name_of(inputs)
    return f"{schema.pattern} {schema.weight_format.name} weights and {rounded} inputs"


def _check_pruned(config: RiaConfig, names: Collection[str], model: str) -> None:
    pruned = {name for name, sparse in stored_modules(list(names)).items() if sparse}
    if config.pruned is not None and pruned != config.pruned:
        name = min(pruned ^ config.pruned)
        raise _refusal(model, f"{name} is pruned in the folder or on this server, but not on both")


def _check_dense(config: RiaConfig, names: Collection[str] | None, model: str) -> None:
    """Check that the files have the same dense tensors as those that the server was started with.

    vLLM would keep the old values, or dummies, of one that is missing, and drop one that it has no place for.
    """
    if names is None:
        return  # no files, so the weights come from elsewhere
    if config.dense_tensors is None:
        raise RiaError(
            f"{model}: this server was started with dummy weights in a folder without any, so nothing shows which "
            "weights it needs. Start it again instead of reloading."
        )
    if different := dense_tensors(names) ^ config.dense_tensors:
        raise _refusal(model, f"{min(different)} is in the folder or on this server, but not on both")


def _check_compressed_tensors(
    config: RiaConfig, present: CompressedTensorsConfig, content: Mapping[str, Any], model: str, revision: str | None
) -> None:
    """Check that config.json describes the same quantization of the same linears as when the server was started."""
    stored = quantization_of(content)
    if not is_24_checkpoint(stored):
        raise _another_form(model)
    new = compressed_tensors_of(stored, f"{model}: config.json")
    if new != present:
        difference = _difference(new, present)
        raise _refusal(
            model, f"its quantization_config differs from the one that this server was started with: {difference}"
        )
    names = _headers(model, revision).names
    if names is not None:
        names = config.translation.names(names)
        _check_pruned(config, names, model)
        _check_dense(config, names, model)


def _difference(new: CompressedTensorsConfig, present: CompressedTensorsConfig) -> str:
    """The first of the differences."""
    if len(new.groups) != len(present.groups):
        return f"it has {len(new.groups)} config_groups there and {len(present.groups)} here"
    for theirs, ours in zip(new.groups, present.groups):
        if theirs.selection != ours.selection:
            return f"the targets of a group, or ignore, are {theirs.selection} there and {ours.selection} here"
        if theirs != ours:
            return f"{', '.join(ours.selection.targets[:3])} has {theirs} there and {ours} here"
    return "sparsity_config"


def _another_form(model: str) -> RiaError:
    return _refusal(model, "its weights are stored in another form than those that this server was started with")


def _refusal(model: str, why: str) -> RiaError:
    return RiaError(f"{model}: {why}. Start a server of that folder anew; this one has begun with other files.")

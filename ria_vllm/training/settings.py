"""What trainers change beside the weights: config.json, generation_config.json, and the tokenizer's files."""

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from ria_vllm.checkpoint.companions import TEMPLATES_FOLDER
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError

GENERATION_FILE = "generation_config.json"
NOT_SETTINGS = {"architectures", "dtype", "quantization_config", "return_dict", "torch_dtype", "transformers_version",
                "use_cache"}  # fmt: skip
"""How a model was loaded, stored or trained, not what it is; as are keys that begin with `_` or `output_`."""
TOKENIZER_FILES = {"added_tokens.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
                   "tokenizer.json", "tokenizer_config.json"}  # fmt: skip

Settings = dict[str, Any]


def changed_settings(base: nn.Module, reader: Reader) -> tuple[Settings, Settings | None, list[str]]:
    """The folder's config.json and generation_config.json with what the model's have now.

    Only keys that have changed since are other than in the folder.

    Returns:
        config.json, generation_config.json if it has changed, and what has changed, as "eos_token_id" or
        "generation_config.eos_token_id".

    Raises:
        RiaError: a file with the model's settings in it would not be read as they are.
    """
    kind: Any = type(base.config)
    config = copy.deepcopy(reader.config)
    section = _section(kind, config)
    before = kind.from_dict(copy.deepcopy(section))
    now = _plain(base.config)
    changes = _changes(_plain(before), now)
    _merge(section, changes)
    lost = _names(_changes(_plain(kind.from_dict(copy.deepcopy(section))), now))
    if lost:
        raise RiaError(
            f"{reader.folder / 'config.json'}: the settings {', '.join(lost)} of `model.config` are others here, and "
            "cannot be added to this file. Change the file to what the model was trained with, or set them back in "
            "`model.config`."
        )
    generation, changes_there = _generation(base, before, reader.folder)
    return config, generation, _names(changes) + [f"generation_config.{name}" for name in _names(changes_there)]


def write_tokenizer(tokenizer: Any, base: Any, copies: dict[str, Path], into: Path) -> dict[str, Path]:
    """Let a tokenizer or processor write its files to the empty folder `into`.

    Args:
        copies: what goes with a model, see `companions`.

    Returns:
        The same with these files in the place of the former tokenizer's.

    Raises:
        RiaError: it is no tokenizer or processor of transformers, or has more tokens than the model has embeddings.
    """
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    inner = getattr(tokenizer, "tokenizer", None) if isinstance(tokenizer, ProcessorMixin) else tokenizer
    if not isinstance(inner, PreTrainedTokenizerBase):
        raise RiaError(
            f"{type(tokenizer).__name__}: not a tokenizer or processor of transformers with files that vLLM reads. "
            "Give the trainer's `processing_class`, or leave `tokenizer` out to keep the folder's."
        )
    rows = base.get_input_embeddings().weight.shape[0]
    largest = max(inner.get_vocab().values(), default=0)
    if largest >= rows:
        raise RiaError(
            f"The tokenizer has a token with the number {largest} ({inner.convert_ids_to_tokens(largest)!r}), but the "
            f"model has only {rows} embeddings. Give the tokenizer that the model was trained with, or leave "
            "`tokenizer` out to keep the folder's."
        )
    tokenizer.save_pretrained(into)
    stale = TOKENIZER_FILES | set(type(inner).vocab_files_names.values())
    kept = {p: path for p, path in copies.items() if p not in stale and not p.startswith(f"{TEMPLATES_FOLDER}/")}
    return kept | {path.relative_to(into).as_posix(): path for path in into.rglob("*") if path.is_file()}


def _generation(base: nn.Module, config: Any, folder: Path) -> tuple[Settings | None, Settings]:
    """generation_config.json, if it has changed, and the changes."""
    from transformers import GenerationConfig

    now = getattr(base, "generation_config", None)
    if not isinstance(now, GenerationConfig):
        return None, {}
    if (folder / GENERATION_FILE).is_file():
        before = GenerationConfig.from_pretrained(folder)
    else:  # readers derive it from config.json then
        before = GenerationConfig.from_model_config(config)
    changes = _changes(_plain(before), _plain(now))
    written = {key: value for key, value in now.to_diff_dict().items() if not key.startswith("_")}
    return (written if changes else None), changes


def _section(kind: Any, config: Settings) -> Settings:
    """Where in config.json the settings of this class are: its text model's may be a part of a larger model's."""
    found = config.get(kind.base_config_key) if kind.base_config_key else None
    if isinstance(found, dict):
        return found
    if config.get("model_type", kind.model_type) != kind.model_type:
        for value in config.values():
            if isinstance(value, dict) and value.get("model_type") == kind.model_type:
                return value
    return config


def _plain(config: Any) -> Settings:
    found: Settings = json.loads(json.dumps(config.to_dict(), default=str))
    return found


def _changes(before: Settings, now: Settings) -> Settings:
    """What differs, down to single entries of dictionaries; None where something is gone."""
    found: Settings = {}
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if key in NOT_SETTINGS or key.startswith(("_", "output_")) or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = _changes(old, new)
            if inner:
                found[key] = inner
        else:
            found[key] = new
    return found


def _merge(settings: Settings, changes: Settings) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        else:
            settings[key] = value


def _names(changes: Settings) -> list[str]:
    found = []
    for key, value in sorted(changes.items()):
        found += [f"{key}.{name}" for name in _names(value)] if isinstance(value, dict) and value else [key]
    return found

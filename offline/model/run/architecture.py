"""The class of transformers that a checkpoint was saved from, and where its text decoder is.

A model that reads images or sound wraps a text decoder. Embedding and reranking models are decoders, too, without a
head or with another one.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.topology import linears_of

# The kinds of models that write text, by transformers' names; the first one that has a class for a configuration says
# which it is if config.json does not. Not all versions of transformers have all kinds.
WRITERS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
)  # fmt: skip


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text decoder: a part of `config`, or all of it.

    Raises:
        RiaError: config.json has something else in that place.
    """
    found = config.get_text_config(decoder=True)
    if isinstance(found, int | float | str | list | dict):  # as config.json has it
        raise RiaError(
            f"{config.name_or_path}: config.json's text_config is not what the configuration of a {config.model_type} "
            "model is in transformers. Download the file again."
        )
    return found


def model_class(name: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that `config.architectures` names.

    Args:
        name: what the user called the model, for errors.

    Raises:
        RiaError: no text decoder, or an architecture that transformers does not have for this configuration.
    """
    kind = config.model_type
    if config.is_encoder_decoder or text_config(config).is_encoder_decoder:
        raise RiaError(
            f"{name}: a {kind} model is an encoder and a decoder that reads what the encoder computes; only decoders "
            "that read text can be compressed."
        )
    writers = _writers(config)
    if not writers or _reads_both_ways(config):
        raise RiaError(f"{name}: a {kind} model has no text decoder; only text decoders can be compressed.")
    architectures = config.architectures or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    if not architectures:
        return writers[0]
    named = [_class_named(architecture, writers) for architecture in architectures]
    found = [cls for cls in named if cls is not None and (cls in writers or cls.config_class is type(config))]
    if not found:
        raise RiaError(
            f"{name}: config.json says {architectures[0]}, which is no class of transformers for a {kind} model. If "
            f'the weights are those of a {writers[0].__name__}, put that into "architectures".'
        )
    return next((cls for cls in found if cls in writers), found[0])


def _reads_both_ways(config: PretrainedConfig) -> bool:
    """Whether it is BERT's or a relative's, which can be made a decoder, but is none."""
    mapping = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    return type(config) in mapping and getattr(config, "is_decoder", True) is False


def _writers(config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    found: list[type[PreTrainedModel]] = []
    for mapping in [getattr(modeling_auto, name, {}) for name in WRITERS]:
        if type(config) in mapping:
            classes = mapping[type(config)]
            found += classes if isinstance(classes, tuple) else (classes,)
    return found


def _class_named(name: Any, writers: list[type[PreTrainedModel]]) -> type[PreTrainedModel] | None:
    import transformers

    for writer in writers:
        # Phi-3.5-MoE's config.json says PhiMoEForCausalLM, and transformers' class is PhimoeForCausalLM.
        if isinstance(name, str) and name.casefold() == writer.__name__.casefold():
            return writer
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The head whose logits the model's own forward pass gives; None if it predicts no tokens.

    Models for embeddings have none. Qwen2.5-Omni's head is that of a model inside it: see `output_heads`.
    """
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def find_decoder(model: PreTrainedModel, folder: Path) -> tuple[str, str]:
    """The paths of the text decoder in a model, and of its list of decoder layers.

    In a model that reads text only, the decoder is all of it except the head. No other tower of a wrapper is taken for
    it, even if it has as many layers.

    Args:
        folder: the model's, for errors.

    Raises:
        RiaError: there is none, it has no such list with linears in it, or the layers need more of each other than the
            residual stream.
    """
    text, kind = text_config(model.config), type(model).__name__
    layers = getattr(text, "num_hidden_layers", None) or 0
    paths = {id(module): path for path, module in model.named_modules()}
    if text is model.config:
        decoder = getattr(model, model.base_model_prefix, model)
    else:
        # Where the wrapper does not know its decoder, it is the outermost model with the text configuration.
        inner = (m for _, m in model.named_modules() if isinstance(m, PreTrainedModel) and m.config is text)
        decoder = model.get_decoder()
        decoder = next(inner, None) if decoder is None or decoder is model else decoder
    if decoder is None or id(decoder) not in paths:
        raise RiaError(f"{folder}: {kind}: transformers finds no text decoder in it, so there is nothing to prune.")
    head = getattr(decoder, decoder.base_model_prefix, decoder) if isinstance(decoder, PreTrainedModel) else decoder
    decoder = head if id(head) in paths else decoder
    path = paths[id(decoder)]
    inside = decoder_layers(decoder, layers)
    return path, f"{path}.{inside}" if path else inside


def decoder_layers(model: nn.Module, num_hidden_layers: int) -> str:
    """The path of the list of decoder layers in a model.

    The model may hold towers for images or sound. Those with a kind of configuration of their own are passed over.

    Raises:
        RiaError: there is no such list with linears in it, or more than one.
    """
    config = getattr(model, "config", None)
    towers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is not type(config) and path
    ]
    found = []
    for path, module in model.named_modules():
        inside_another = any(part.isdigit() for part in path.split("."))
        if not isinstance(module, nn.ModuleList) or len(module) != num_hidden_layers or inside_another:
            continue
        if any(path.startswith(f"{tower}.") for tower in towers) or isinstance(next(iter(module), None), nn.Linear):
            continue
        if linears_of(module):
            found.append(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise RiaError(
            f"{type(model).__name__}: {', '.join(found)} have {num_hidden_layers} layers each, and nothing says which "
            "of them are the text decoder's. Such a model cannot be compressed."
        )
    raise RiaError(
        f"{type(model).__name__}: no list of {num_hidden_layers} decoder layers with nn.Linear in it, so there is "
        "nothing to prune. (GPT-2 and similar models use Conv1D, which this tool cannot prune.)"
    )


def find_base(model: PreTrainedModel, decoder: str) -> str:
    """The path of the outermost module around the decoder whose forward pass runs it, without the head if it can.

    Args:
        decoder: its path.
    """
    for path in [model.base_model_prefix, *_around(decoder)]:
        inside = path in ("", decoder) or decoder.startswith(f"{path}.")
        # Some wrappers only hold several models, and have no forward pass of their own.
        if inside and type(model.get_submodule(path)).forward is not nn.Module.forward:
            return path
    return decoder


def outside_decoder(model: nn.Module, decoder: str) -> list[tuple[str, nn.Module]]:
    """The modules that lie neither in the text decoder nor around it, by their names.

    Args:
        decoder: its path.
    """
    around = {*_around(decoder), decoder}
    named = model.named_modules() if decoder else ()
    return [(name, m) for name, m in named if name not in around and not name.startswith(f"{decoder}.")]


def output_heads(model: PreTrainedModel, decoder: str) -> list[nn.Module]:
    """The heads of the models around the decoder; wrappers may be around each other."""
    around = [model.get_submodule(path) for path in _around(decoder)]
    found = [output_head(module) for module in around if isinstance(module, PreTrainedModel)]
    return [head for head in found if head is not None]


def _around(decoder: str) -> list[str]:
    """The paths of the modules around the decoder, the outermost first."""
    return ["", *(decoder[:end] for end, letter in enumerate(decoder) if letter == ".")]

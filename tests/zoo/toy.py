"""What a toy of the zoo is: a model type with the settings that make it tiny, and how its random weights are drawn.

Widths are multiples of 64, which 2:4 needs, on each of two ranks too.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from families import save_tokenizer
from safetensors.torch import load_file, save_file

VOCABULARY = 320  # the byte-level tokenizer has 258 tokens; those from 258 on mark images and sound
BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
# The logits of a router, relative to those of other linears: so far apart that rounding changes no choice of experts.
ROUTER_SCALE = 4.0
ROUTERS = ("router", "gate.weight", "block_sparse_moe.gate", "mlp.gate.", "feed_forward.gate.")
BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")  # with values of their own in the files
# A processor's parts, and where transformers' Auto classes have their names.
PARTS = {
    "image_processor": ("image_processing_auto", "IMAGE_PROCESSOR_MAPPING_NAMES"),
    "video_processor": ("video_processing_auto", "VIDEO_PROCESSOR_MAPPING_NAMES"),
    "feature_extractor": ("feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING_NAMES"),
}


@dataclass(frozen=True)
class Processor:
    """What turns images and sound into tokens.

    Attributes:
        tokens: attribute of the tokenizer -> special token; they have the ids from 258 on.
        placeholder: what stands for an image in a prompt; "" if the model reads none.
        image: settings of the image processor.
        sound: settings of the feature extractor.
        own: settings of the processor itself.
        like: the model type whose image processor it uses; "" for its own.
    """

    tokens: dict[str, str]
    placeholder: str
    image: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    sound: dict[str, Any] = field(default_factory=dict)
    like: str = ""


@dataclass(frozen=True)
class Toy:
    """One model type of the zoo.

    Attributes:
        model_type: if it is not the toy's name in the zoo.
        settings: of its config, on top of `BASE`; None leaves a key of `BASE` out.
        mechanism: what it stands for in the tests that CI runs; "" if only `make test-zoo` runs it.
        not_served: why vLLM's CPU build cannot run even the dense model; such a toy is only pruned and exported
            (MoE: see test_built.py).
        text_only: why vLLM's CPU build cannot run the dense model with an image; such a toy is served with text.
        stays_dense: part of the names of matrices that are not pruned -> why not.
        no_fold: why none is possible.
        gathers: end of the names of linears that gather their input themselves, though they do not read the residual
            stream, in some layers at least -> why no fold does it. Beside those in `check.GATHERS`.
        engine: arguments of vLLM's `LLM` that the dense model needs too; `run` says why.
        dtype: of the stored weights, and the one that vLLM computes in.
        edits: keys of config.json that transformers' config lacks, but the folders on the hub have, and vLLM reads.
        renames: beginning of names in the files that transformers saves -> what the folders on the hub have.
        transposed: part of the names of stacked tensors that the folders on the hub have as [experts, in, out].
        zeros: ends of the names of parameters that are 0; `shaped` says why.
        shaped: how the toy differs from the models on the hub, since vLLM and transformers disagree about those.
        run: what `engine` asks for, and why.
        differs: why vLLM's dense model and transformers differ by more than the order of sums in float32 makes them.
        processor: of images, behind a wrapper.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    mechanism: str = ""
    not_served: str = ""
    text_only: str = ""
    stays_dense: dict[str, str] = field(default_factory=dict)
    no_fold: str = ""
    gathers: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    edits: dict[str, Any] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)
    transposed: str = ""
    zeros: tuple[str, ...] = ()
    shaped: str = ""
    run: str = ""
    differs: str = ""
    processor: Processor | None = None
    model_type: str = ""


# What a toy says about itself to readers. The rest decides what comes out when it runs.
PROSE = ("mechanism", "not_served", "text_only", "no_fold", "gathers", "shaped", "run", "differs")


def fingerprint(name: str, toy: Toy) -> str:
    """Another one for each toy that can come out differently: other settings, another way to run it."""
    runs = {key: value for key, value in asdict(toy).items() if key not in PROSE}
    ways = [bool(toy.not_served), bool(toy.text_only)]
    content = json.dumps([toy.model_type or name, BASE, ROUTER_SCALE, runs, ways], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def config_of(model_type: str, toy: Toy) -> Any:
    from transformers import AutoConfig

    settings = BASE | toy.settings
    return AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if v is not None})


def auto_class(toy: Toy) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if toy.processor else AutoModelForCausalLM


def randomize(model: torch.nn.Module, zeros: tuple[str, ...]) -> None:
    """Draw every parameter so that the logits depend on it: none keeps a tiny or neutral initial value.

    Args:
        zeros: ends of the names of parameters that become 0 instead.
    """
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if not parameter.is_floating_point() or "inv_freq" in name:
                continue
            if name.endswith(zeros):
                parameter.zero_()
            elif parameter.dim() >= 2 and parameter.squeeze().dim() >= 2:
                inputs = parameter.shape[1] if "experts" in name and parameter.dim() == 3 else parameter[0].numel()
                scale = ROUTER_SCALE if any(part in name for part in ROUTERS) else 1.5
                parameter.normal_(std=inputs**-0.5 * scale)
            elif isinstance(parameter, torch.nn.Parameter) or name.endswith(BUFFERS):
                parameter.add_(torch.randn_like(parameter) * 0.2)


def merged(config: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` with the edits, those of nested configs too."""
    nested = {k: merged(config[k], v) for k, v in edits.items() if isinstance(v, dict) and k in config}
    return config | edits | nested


def as_on_the_hub(path: Path, toy: Toy) -> None:
    """Give the tensors of a file the names and layouts that the folders on the hub have."""
    tensors = load_file(path)
    if toy.transposed:
        tensors = {n: t.mT.contiguous() if toy.transposed in n else t for n, t in tensors.items()}
    for old, new in toy.renames.items():
        tensors = {new + n.removeprefix(old) if n.startswith(old) else n: tensor for n, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})


def build(model_type: str, toy: Toy, folder: Path) -> Path:
    """Save the random model with a tokenizer into `folder`, unless it is there already."""
    if (folder / "tokenizer.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = auto_class(toy).from_config(config_of(model_type, toy), dtype=torch.float32).eval()
    randomize(model, toy.zeros)
    model.to(getattr(torch, toy.dtype)).save_pretrained(folder)
    as_on_the_hub(folder / "model.safetensors", toy)
    path = folder / "config.json"
    path.write_text(json.dumps(merged(json.loads(path.read_text()), toy.edits)))
    if toy.processor is None:
        save_tokenizer(folder)
    else:
        save_processor(model_type, toy.processor, folder)
    return folder


def save_processor(model_type: str, processor: Processor, folder: Path) -> None:
    import transformers
    from transformers import AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = {name: str(token) for name, token in processor.tokens.items()}
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    tokenizer.save_pretrained(folder)
    tokenizer = type(tokenizer).from_pretrained(folder, extra_special_tokens=names, pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    like = processor.like or model_type
    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    settings = {"image_processor": processor.image, "video_processor": {}, "feature_extractor": processor.sound}
    for part in PARTS.keys() & set(kind.get_attributes()):
        module, mapping = PARTS[part]
        name = getattr(import_module(f"transformers.models.auto.{module}"), mapping)[like]
        name = name if isinstance(name, str) else name.get("torchvision") or name["pil"]
        parts[part] = getattr(transformers, name)(**settings[part])
    kind(**parts, **processor.own).save_pretrained(folder)

"""What the header of a GGUF file says about a model's function, and transformers' reader leaves out or gets wrong.

llama.cpp's loader says what a key means, and what holds where a file lacks it. What the converted model does is asked
of the model where that is possible: its frequencies, norms and scales. A later transformers that reads a key then
passes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ria_vllm.offline.model.gguf.gguf_header import LONG_ROPE_FACTORS, ROPE_FACTORS, Header

ROPE_BASE = 10000.0  # where a file names none
# The values with which a key that transformers ignores changes nothing. llama.cpp itself writes many of them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "embedding_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "router_logit_softcapping": (0,),
    "ssm.dt_b_c_rms": (False,),
}
# Keys that only these architectures heed, and transformers' name for each.
HEEDED = {
    "attn_logit_softcapping": ("attn_logit_softcapping", ("gemma2",)),
    "final_logit_softcapping": ("final_logit_softcapping", ("gemma2", "gemma3", "gemma4")),
    "attention.shared_kv_layers": ("num_kv_shared_layers", ("gemma4",)),
}
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
GATING = "expert_gating_func"
SOFTMAX = 1
# The numbers of layers with which llama.cpp knows that it has a Gemma with 27B parameters, whose scale is another one.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def lost(header: Header, model: Any) -> Iterator[str]:
    """Each thing that the header says and the model does otherwise, with its value, for an error.

    Args:
        model: what transformers makes of the file.

    Raises:
        RiaError: a key that should have a number has none.
    """
    for key, neutral in NEUTRAL.items():
        if key in header.keys and header.keys[key] not in neutral:
            yield _shown(header, key)
    for key, (name, architectures) in HEEDED.items():
        if key in header.keys and header.architecture in architectures:
            if not _close(header.number(key), getattr(model.config, name, None) or 0.0):
                yield _shown(header, key)
    if header.number(GATING) not in (0, SOFTMAX) and not hasattr(model.config, "scoring_func"):
        yield _shown(header, GATING)
    yield from _rotary(header, model)
    yield from _window(header, model.config)
    yield from _norms(header, model)
    yield from _attention_scale(header, model)


def _shown(header: Header, key: str) -> str:
    value = header.keys[key]
    return f"{header.full(key)} ({value:g})" if isinstance(value, float) else f"{header.full(key)} ({value})"


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-3)


def _rotary(header: Header, model: Any) -> Iterator[str]:
    named = [(name, buffer.double()) for name, buffer in model.named_buffers()]
    frequencies = [found for name, found in named if name.endswith("inv_freq") and "original" not in name]
    width = _rotary_width(header)
    kind = header.keys.get("rope.scaling.type", "linear")
    kind = "longrope" if any(name in header.tensors for name in LONG_ROPE_FACTORS) else kind
    factor = header.number("rope.scaling.factor", header.number("rope.scale_linear")) or 1.0
    factor = 1.0 if kind == "none" else factor
    if kind not in ("none", "linear"):
        right = kind in _rope_types(model.config)
    elif not frequencies:
        right = factor == 1 and header.rope_factors is None
    else:
        base = header.number("rope.freq_base", ROPE_BASE)
        right = _turns(frequencies, width, base, factor, header.rope_factors)
    if not right:
        same_width = any(width in (0, 2 * len(one)) for one in frequencies)
        yield " and ".join(_rotary_keys(header, kind, same_width))
    elif "rope.freq_base_swa" in header.keys:  # of layers with a sliding window
        width = int(header.number("rope.dimension_count_swa", header.number("attention.key_length_swa", width)))
        if not _turns(frequencies, width, header.number("rope.freq_base_swa"), 1.0, None):
            yield _shown(header, "rope.freq_base_swa")


def _rotary_width(header: Header) -> int:
    """How many channels of a head are turned; 0: the file does not say."""
    heads = header.keys.get("attention.head_count")
    by_heads = header.number("embedding_length") // heads if isinstance(heads, int) and heads > 0 else 0
    return int(header.number("rope.dimension_count", header.number("attention.key_length", by_heads)))


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    of_kinds = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    return {str(one.get("rope_type")) for one in of_kinds}


def _turns(
    frequencies: Sequence[torch.Tensor], width: int, base: float, factor: float, divisors: torch.Tensor | None
) -> bool:
    """Whether the model has these frequencies.

    Args:
        frequencies: the model's, each float64 [any length].
        width: of what is turned, twice the number of frequencies; 0: any.
        factor: by which all are divided.
        divisors: [width / 2], by which each is divided, too; None: by nothing.
    """
    for found in frequencies:
        count = len(found)
        if (width and 2 * count != width) or (divisors is not None and len(divisors) != count):
            continue
        expected = base ** -(torch.arange(count, dtype=torch.float64, device=found.device) / count) / factor
        expected = expected if divisors is None else expected / divisors.to(expected)
        if torch.allclose(found, expected, rtol=1e-3, atol=1e-12):
            return True
    return False


def _rotary_keys(header: Header, kind: str, same_width: bool) -> list[str]:
    """What the file says about rotary embeddings that the model does not do."""
    named = [name for name in (ROPE_FACTORS, *LONG_ROPE_FACTORS) if name in header.tensors]
    keys = [] if kind == "linear" or "rope.scaling.type" not in header.keys else ["rope.scaling.type"]
    keys += [key for key in ("rope.scaling.factor", "rope.scale_linear") if header.number(key) not in (0, 1)]
    if not keys and not named:
        keys = ["rope.freq_base" if same_width else "rope.dimension_count"]
    return named + [_shown(header, key) for key in keys if key in header.keys] or ["rotary embeddings with base 10000"]


def _window(header: Header, config: Any) -> Iterator[str]:
    """Sliding windows: how wide, and in which layers."""
    context = getattr(config, "max_position_embeddings", None) or math.inf
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    slides = [kind == "sliding_attention" for kind in kinds]
    used = (getattr(config, "sliding_window", None) or 0) if any(slides) else 0
    stated = header.number("attention.sliding_window", 4096 if header.architecture == "gemma2" else 0)
    used, stated = (0 if width >= context else width for width in (used, stated))
    if stated != used:
        known = "attention.sliding_window" in header.keys
        yield _shown(header, "attention.sliding_window") if known else "attention without a sliding window"
    elif stated and "attention.sliding_window_pattern" in header.keys and _pattern(header, len(slides)) != slides:
        yield header.full("attention.sliding_window_pattern")


def _pattern(header: Header, layers: int) -> list[bool]:
    """Which layers have a window: those listed, or all but the last of each period."""
    key = "attention.sliding_window_pattern"
    if isinstance(header.keys[key], list):
        return [bool(one) for one in header.keys[key][:layers]]
    period = header.number(key)
    return [period == 0 or index % period < period - 1 for index in range(layers)]


def _norms(header: Header, model: Any) -> Iterator[str]:
    stated = {key: header.number(key) for key in EPSILONS if header.number(key)}
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    used = {getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms} - {None}
    if stated and not all(any(_close(one, epsilon) for epsilon in stated.values()) for one in used):
        yield " or ".join(_shown(header, key) for key in stated)


def _attention_scale(header: Header, model: Any) -> Iterator[str]:
    stated, architecture = header.number("attention.scale"), header.architecture
    if not stated and architecture in LAYERS_OF_27B:
        by_heads = header.number("embedding_length") // (header.number("attention.head_count") or 1)
        large = header.number("block_count") == LAYERS_OF_27B[architecture]
        stated = ((by_heads if large else header.number("attention.key_length", by_heads)) or 1) ** -0.5
    attention = [module for module in model.modules() if "Attention" in type(module).__name__]
    used = {getattr(module, "scaling", None) for module in attention} - {None}
    if stated and not all(_close(scale, stated) for scale in used):
        known = "attention.scale" in header.keys
        yield _shown(header, "attention.scale") if known else f"the scale of its attention ({stated:.4g})"

"""RMS norms: what they do to a token, and how a module is recognised as one."""

import torch
from torch import nn

from ria_vllm.offline.model.experiments.experiment import Seen, all_in_float64


def rms_factors(X: torch.Tensor) -> torch.Tensor:
    """What an RMS norm multiplies each token of X [..., width] by: 1 / RMS, [..., 1]."""
    return X.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def gains_of(norm: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """What an RMS norm that computes in `dtype` multiplies each channel by: [width], as the norm returns it."""
    weight = next(norm.parameters(recurse=False))
    with torch.no_grad():
        return norm(torch.ones(1, weight.numel(), dtype=dtype, device=weight.device))[0]


def is_rms_norm(layer: nn.Module, call: Seen) -> bool:
    """Whether this is the call of an RMS norm with gains. Its epsilon, which changes little, is left out."""
    module = layer.get_submodule(call.name)
    if isinstance(module, nn.Linear) or not [*module.parameters(recurse=False)] or call.returned is None:
        return False
    if call.returned.shape != call.read.shape or not call.read.is_floating_point():
        return False
    try:
        with all_in_float64():
            expected = gains_of(module, call.read.dtype) * call.read * rms_factors(call.read)
    except Exception:  # of a module that is something else
        return False
    same = expected.shape == call.returned.shape
    return same and bool((call.returned - expected).abs().max() <= 1e-3 * expected.abs().max())

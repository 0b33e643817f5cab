"""One operator, `ria::sparse24_linear`, with one overload per backend; each backend is a module of this package.

A backend module has `NAME`, `unavailable(device, dtype, out_features, in_features) -> str | None`,
`pack(compressed, bitmask) -> tuple[Tensor, ...]` and `apply(x, packed, out_features, input_permutation, bias)`. One
that serves quantized weights under 16-bit activations has a `pack(compressed, bitmask, scales)`, scales float32 [out],
and is not `unavailable` for the weights' dtype.
"""

import os
from functools import lru_cache
from types import ModuleType

import torch

from ria_vllm import sparse24
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels import reference
from ria_vllm.serve.kernels.cpu import backend as cpu
from ria_vllm.serve.kernels.cuda import backend as cutlass
from ria_vllm.serve.kernels.torch import cusparselt

# In order of preference.
BACKENDS: tuple[ModuleType, ...] = (
    cutlass,
    cusparselt,
    cpu,
    reference,
)

# The activations that each kind of quantized weights is multiplied with, where a backend has a kernel for them.
_ACTIVATIONS = {torch.int8: (torch.bfloat16,), torch.float8_e4m3fn: (torch.bfloat16, torch.float16)}


def explain(
    device: torch.device, dtype: torch.dtype, out_features: int, in_features: int
) -> list[tuple[str, str | None]]:
    """Each backend's name, in order of preference, with the reason why it cannot serve the layer, or None."""
    return [(backend.NAME, _reason(backend, device, dtype, out_features, in_features)) for backend in BACKENDS]


def _reason(
    backend: ModuleType, device: torch.device, dtype: torch.dtype, out_features: int, in_features: int
) -> str | None:
    """Why the backend cannot serve the layer, or None."""
    reason = backend.unavailable(device, dtype, out_features, in_features)
    return fault(backend, device) if reason is None and device.type == "cuda" else reason


@lru_cache
def fault(backend: ModuleType, device: torch.device) -> str | None:
    """What goes wrong when the backend multiplies something small on this device, or None.

    A driver too old for the library, a torch without kernels for this GPU: better found here, where the next backend
    can take the layer, than by its weights.
    """
    try:
        compressed, bitmask = sparse24.compress(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
        x = torch.ones(8, 64, dtype=torch.bfloat16, device=device)
        y = backend.apply(x, backend.pack(compressed, bitmask), 64, None, None)
        right = bool((y == 32).all())
    except (RiaError, RuntimeError) as error:
        return f"a small product fails on this GPU: {str(error) or type(error).__name__}".splitlines()[0]
    return None if right else "a small product comes out wrong on this GPU"


def keeps_quantized(
    backend: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    weights: torch.dtype,
) -> bool:
    """Whether `backend`, chosen for activations of `dtype`, serves quantized weights of dtype `weights` as they are."""
    served = dtype in _ACTIVATIONS.get(weights, ())
    return served and backend.unavailable(device, weights, out_features, in_features) is None


def choose(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> ModuleType:
    """The backend for a layer: the first that can serve it, or the one RIA_VLLM_BACKEND names.

    Raises:
        RiaError: RIA_VLLM_BACKEND names no backend, or one that cannot serve the layer; or none can.
    """
    layer = f"a {out_features} x {in_features} layer of dtype {dtype} on {device}"
    forced = os.environ.get("RIA_VLLM_BACKEND")
    if forced:
        named = {backend.NAME: backend for backend in BACKENDS}
        if forced not in named:
            raise RiaError(f"RIA_VLLM_BACKEND={forced} is not a backend; choose from {', '.join(named)}")
        reason = _reason(named[forced], device, dtype, out_features, in_features)
        if reason:
            raise RiaError(f"RIA_VLLM_BACKEND={forced} cannot serve {layer}: {reason}")
        return named[forced]
    reasons = []
    for backend in BACKENDS:
        reason = _reason(backend, device, dtype, out_features, in_features)
        if reason is None:
            return backend
        reasons.append(f"{backend.NAME}: {reason}")
    raise RiaError(f"no backend can serve {layer}: {'; '.join(reasons)}")

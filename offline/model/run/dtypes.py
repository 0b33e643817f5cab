"""The dtype that layers are computed in, which may differ from the one that they are stored in.

A CPU without bfloat16 instructions multiplies bfloat16 four to six times slower than float32.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import name_of
from ria_vllm.hf.dtypes import kept_dtypes

CHOICES = ("auto", "bfloat16", "float32", "float16")
# CPU flags of x86-64 and Arm, as Linux names them.
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Values of ONEDNN_MAX_CPU_ISA that keep torch's matrix products from using bfloat16 instructions.
ISA_WITHOUT_BF16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})


def choose_dtype(stored: torch.dtype, device: torch.device, asked: str = "auto", training: bool = False) -> torch.dtype:
    """The dtype to compute in on a device, for a checkpoint stored in `stored`.

    Args:
        asked: one of CHOICES. auto: as stored, unless the device computes slowly in that dtype; then float32.
        training: float16 is not computed in, because small gradients would vanish in it. Where float16 is stored,
            bfloat16 takes its place, though it rounds what the forward pass reads; with `auto` only on devices that
            are fast in it.

    Raises:
        RiaError: `asked` cannot hold every value of `stored`, so weights and rotary frequencies would be rounded.
    """
    if training and stored == torch.float16:
        narrow = asked == "bfloat16" or (asked == "auto" and fast_bf16(device))
        return torch.bfloat16 if narrow else torch.float32
    if asked != "auto":
        dtype = getattr(torch, asked)
        if torch.promote_types(stored, dtype) != dtype:
            wider = " or ".join(dict.fromkeys((name_of(stored), "float32")))
            raise RiaError(
                f"--compute-dtype {asked}: the weights are {name_of(stored)}, which {asked} would round. Give {wider}, "
                "or leave it out."
            )
        return dtype
    slow_bf16 = stored == torch.bfloat16 and not fast_bf16(device)
    slow = slow_bf16 or (stored == torch.float16 and device.type == "cpu")
    return torch.float32 if slow else stored


def keep_float32(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Make the tensors float32 that transformers keeps in it: `from_pretrained` does this, `_from_config` does not.

    Most are biases by which routers choose experts, and bfloat16 would make many of these the same.

    Args:
        model: of transformers; may be on the meta device.
        dtype: the model's own.
        folder: for the error.

    Raises:
        RiaError: this version of transformers does not say which these are.
    """
    kept = kept_dtypes(model, dtype, str(folder))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in kept and tensor.is_floating_point():
            tensor.data = tensor.data.to(kept[name])


def fast_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 matrices on this device with dedicated instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return limit not in ISA_WITHOUT_BF16 and not BF16_FLAGS.isdisjoint(_cpu_flags())


def _cpu_flags() -> frozenset[str]:
    try:
        content = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", content, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()

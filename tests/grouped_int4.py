"""A weight format with scales for groups of columns, which no format of the package has."""

from typing import ClassVar

import torch

from ria_vllm import sparse24
from ria_vllm.formats import BITMASK, Part, WeightFormat

GROUP = 32


class GroupedInt4(WeightFormat):
    """Integers in -7..7, two to a byte, and a float32 scale for each GROUP stored columns of a row."""

    name = "int4"
    quantization: ClassVar = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": GROUP}
    parts = (
        Part("compressed", (torch.uint8,), 4, fill=0x88),
        BITMASK,
        Part("weight_scale", (torch.float32,), GROUP, fill=1),
    )

    def quantize(self, weight, dtype):
        groups = weight.float().unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(-1) / 7
        scales = torch.where(scales > 0, scales, 1.0)
        return ((groups / scales[..., None]).round() * scales[..., None]).flatten(1).to(dtype), scales

    def encode(self, weight, mask, scales):
        compressed, bitmask = sparse24.compress(weight, mask)
        values = (compressed.float().unflatten(1, (-1, GROUP // 2)) / scales[..., None]).round().flatten(1).to(
            torch.int8
        ) + 8
        pairs = values.to(torch.uint8).unflatten(1, (-1, 2))
        return {"compressed": pairs[..., 0] | pairs[..., 1] << 4, "bitmask": bitmask, "weight_scale": scales}

    def values(self, parts, dtype):
        pairs = torch.stack([parts["compressed"] & 15, parts["compressed"] >> 4], -1).flatten(1).float() - 8
        scaled = pairs.unflatten(1, (-1, GROUP // 2)) * parts["weight_scale"][..., None]
        return scaled.flatten(1).to(dtype)

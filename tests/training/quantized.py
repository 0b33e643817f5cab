"""A compressed folder with its weights in another format."""

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FORMATS
from ria_vllm.format.schema import INT8_TOKENS, RiaSchema


def quantized(like, out, name, shrink=1.0, activations=False):
    """`like` with its weights in another format; `shrink`: scales smaller than those of the largest magnitudes.
    activations: inputs are rounded to int8."""
    reader, chosen = Reader(like), FORMATS[name]
    units = {other: reader.tensor(other) for other in reader.dense_names}
    for linear in reader.sparse_names:
        before = reader.linear(linear)
        mask = sparse24.mask_from_bitmask(before.parts["bitmask"])
        _, scales = chosen.quantize(before.stored(), torch.bfloat16)
        rounded, scales = chosen.quantize(before.stored(), torch.bfloat16, scales * shrink)
        units |= {f"{linear}.{part}": tensor for part, tensor in chosen.encode(rounded, mask, scales).items()}
        units[f"{linear}.shape"] = torch.tensor(before.shape).view(2, 1)
        if before.input_permutation is not None:
            units[f"{linear}.input_permutation"] = before.input_permutation
    content = reader.config["quantization_config"] | {"weights": dict(chosen.quantization) | {"dtype": "bfloat16"}}
    if activations:
        content["input_activations"] = INT8_TOKENS.model_dump()
    config = reader.config | {"quantization_config": RiaSchema.parse(content, "").model_dump(exclude_none=True)}
    writer = CheckpointWriter(out)
    writer.write("all", units)
    writer.finish(["all"], {"config.json": config}, {}, 1 << 40)
    return out

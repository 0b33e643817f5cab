"""What a folder of ours says as one of compressed-tensors: the same tensors, where no columns are permuted.

compressed-tensors 0.12, the last version with 2:4 weights, reads `NAME.compressed`, `NAME.bitmask` and `NAME.shape` as
`sparse-24-bitmask`, and `NAME.weight_scale` beside them.
"""

from collections.abc import Sequence
from typing import Any

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FP8, INT8
from ria_vllm.format.pattern import TWO_OF_FOUR
from ria_vllm.format.schema import RiaSchema

FORMATS = {FLOAT: "dense", INT8: "int-quantized", FP8: "float-quantized"}
VERSION = "0.12.2"


def quantization_config(schema: RiaSchema, linears: Sequence[str], permuted: Sequence[str]) -> dict[str, Any]:
    """For config.json; it names each linear, so that no other is taken for one of them.

    Args:
        linears: those that are pruned.
        permuted: those of them whose columns are permuted.

    Raises:
        RiaError: compressed-tensors has no words for what the folder holds.
    """
    way = "write the dense form: leave out --format"
    reason = None
    if permuted:
        reason = f"{permuted[0]} has permuted columns: compress with --permute none, or {way}"
    elif schema.pattern != TWO_OF_FOUR:
        reason = f"it holds {TWO_OF_FOUR} alone, and this folder is {schema.pattern}: {way}"
    elif schema.weight_format not in FORMATS:
        reason = (
            f"it packs {schema.weight_format.name} in another way: compress with --scheme BF16, W8A8 or FP8, or {way}"
        )
    elif schema.experts:
        reason = f"{schema.experts[0].module} has pruned experts, which its readers expect dense: {way}"
    if reason is not None:
        raise RiaError(f"--format compressed-tensors: {reason}.")
    words, names = schema.weight_format.quantization, list(linears)
    inputs = schema.input_activations and schema.input_activations.model_dump()
    group = words and {"targets": names, "weights": {**words, "dynamic": False}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": FORMATS[schema.weight_format],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group} if group else {},
        "ignore": [],
        "sparsity_config": {
            "format": schema.format,
            "sparsity_structure": str(schema.pattern),
            "global_sparsity": schema.sparsity_config.global_sparsity,
            "targets": names,
            "ignore": [],
        },
    }

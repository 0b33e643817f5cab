"""The Hugging Face quantizer for quant_method "ria": it decompresses linears as they load, into the model's own order.

What comes out is a plain dense model, at a dense model's size: for HF's tools. Serving does not go through here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ria_vllm import permutation, sparse24
from ria_vllm.checkpoint import check_digests, load_permutations, wrong_scale
from ria_vllm.errors import RiaError
from ria_vllm.schema import PERMUTATIONS_FILE, QUANT_METHOD, RiaSchema


class RiaQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder that ria-vllm wrote."""

    def __init__(self, **content: Any):
        self.schema = RiaSchema.parse(content, "config.json")
        self.quant_method = QUANT_METHOD
        self.dequantize = True  # HF then forgets the config after loading: the model is a plain one

    def to_dict(self) -> dict[str, Any]:
        return self.schema.model_dump()


class RiaQuantizer(HfQuantizer):
    requires_calibration = True

    def __init__(self, quantization_config: RiaQuantizationConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.decompress = Decompress()

    def _process_model_before_weight_loading(
        self, model: torch.nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        path = None if folder is None else folder / PERMUTATIONS_FILE
        if path is not None and not path.is_file():
            # The hub's cache holds only what was asked for: CACHE/models--USER--NAME/snapshots/COMMIT.
            same = {}
            if folder.parent.name == "snapshots":
                same = {"revision": folder.name, "cache_dir": str(folder.parents[2])}
            name = model.config._name_or_path
            found = cached_file(name, PERMUTATIONS_FILE, _raise_exceptions_for_missing_entries=False, **same)
            path = None if found is None else Path(found)
        schema = self.quantization_config.schema
        if path is None and schema.permutes:
            raise RiaError(
                f"{folder}: {PERMUTATIONS_FILE} is missing, though the model was compressed with permutations."
            )
        permutations = {} if path is None else load_permutations(path)
        check_digests(schema, permutations, map(Path, checkpoint_files or ()), folder or "config.json")
        self.decompress.permutations = permutations

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **_: Any) -> None:
        # HF keeps the conversions to undo them when it saves; a plain dense model is to be saved as it is.
        kept = [c for c in getattr(model, "_weight_conversions", None) or [] if self.decompress not in _operations(c)]
        model._weight_conversions = kept or None
        # HF leaves tensors that it renamed or converted in the stored dtype, where a quantizer is at work.
        in_float32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not any(part in name for part in in_float32):
                parameter.data = parameter.data.to(self.decompress.dtype or parameter.dtype)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.decompress.dtype = dtype
        return dtype

    def get_weight_conversions(self) -> list[WeightConverter]:
        parts = [r"\.compressed$", r"\.bitmask$", r"\.shape$"]
        if self.quantization_config.schema.weights is not None:
            parts.append(r"\.weight_scale$")
        return [WeightConverter(source_patterns=parts, target_patterns=".weight", operations=[self.decompress])]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Decompress(ConversionOps):
    """compressed, bitmask and permutation of one linear -> its dense weight in the model's own order."""

    permutations: Mapping[str, torch.Tensor] = {}
    dtype: torch.dtype | None = None

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, torch.Tensor]:
        compressed, bitmask, shape = (_single(input_dict, part) for part in ("compressed", "bitmask", "shape"))
        name = full_layer_name.removesuffix(".weight")
        wrong = sparse24.check(compressed, bitmask, tuple(shape.flatten().tolist()))
        if wrong:
            raise RiaError(f"{name}: {wrong}. The file is damaged; get it again.")
        scale = _single(input_dict, "weight_scale")
        wrong = wrong_scale(compressed, scale)
        if wrong:
            raise RiaError(f"{name}: {wrong}. The file is damaged; get it again.")
        dense = sparse24.decompress(compressed, bitmask)
        if scale is not None:
            dense = dense.float() * scale
        p = self.permutations.get(name)
        if p is not None:
            wrong = permutation.check(p, dense.shape[1])
            if wrong:
                raise RiaError(f"{PERMUTATIONS_FILE}: {name}: not a permutation: {wrong}. Get the file again.")
            dense = dense[:, permutation.invert(p).long().to(dense.device)]
        return {".weight": dense.to(self.dtype or dense.dtype)}


def _operations(conversion: Any) -> list[ConversionOps]:
    return getattr(conversion, "operations", [])


def _single(input_dict: dict[str, Any], part: str) -> torch.Tensor | None:
    found = next((value for key, value in input_dict.items() if part in key), None)
    return found[0] if isinstance(found, list) else found


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(RiaQuantizationConfig)
    register_quantizer(QUANT_METHOD)(RiaQuantizer)

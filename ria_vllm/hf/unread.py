"""Keeps transformers from giving a model random weights because it does not see that its files are compressed.

transformers asks the configuration which quantizer to use. It leaves `quantization_config` out where a class of the
text decoder alone reads the folder of a wrapper, and a caller may pass a configuration that has none, perhaps with
another quantizer. Then it would find none of the pruned weights, list them in a table, and go on.
"""

import functools
import inspect
import sys
from collections.abc import Collection
from typing import Any

from transformers import core_model_loading

from ria_vllm.errors import RiaError

LOADER = "convert_and_load_state_dict_in_model"
# Modules of transformers that import the loader by its name, and may have done so already.
USERS = ("transformers.modeling_utils", "transformers.modeling_layers")

UNKNOWN = object()


def refuse_unread_weights(reader: type) -> None:
    """Have transformers' loader of tensors refuse compressed ones without the quantizer `reader`. May be called again.

    No other quantizer reads them: compressed-tensors' own has dropped sparse formats.
    """
    load = getattr(core_model_loading, LOADER, None)
    if load is None or hasattr(load, "ria_checks"):  # None: another version; reading must not fail because of that
        return
    signature = inspect.signature(load)

    @functools.wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        quantizer = getattr(given.get("load_config"), "hf_quantizer", UNKNOWN)
        if quantizer is not UNKNOWN and not isinstance(quantizer, reader):
            _check_dense(given.get("model"), given.get("state_dict") or ())
        return load(*args, **kwargs)

    checked.__dict__["ria_checks"] = True
    for module in (core_model_loading, *(sys.modules[name] for name in USERS if name in sys.modules)):
        if getattr(module, LOADER, None) is load:
            setattr(module, LOADER, checked)


def _check_dense(model: Any, names: Collection[str]) -> None:
    linears = [name.removesuffix(".bitmask") for name in names if name.endswith(".bitmask")]
    found = next((linear for linear in linears if f"{linear}.compressed" in names), None)
    if found is not None:
        kind = type(getattr(model, "config", None)).__name__
        raise RiaError(
            f"{found} is stored compressed, but the {kind} that this {type(model).__name__} is loaded with has no "
            "quantization_config of ria-vllm, so its weights would be random. Load the whole model by its Auto class, "
            "and take the text decoder from it; or load the dense folder that `ria-vllm export` writes."
        )

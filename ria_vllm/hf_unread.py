"""Keeps transformers from giving a model random weights because it does not see that its files are compressed.

transformers asks the configuration which quantizer to use. It leaves `quantization_config` out where a class of the
text decoder alone reads the folder of a wrapper, and a caller may pass a configuration that has none. Then it would
find none of the pruned weights, list them in a table, and go on.
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


def refuse_unread_weights() -> None:
    """Have transformers' loader of tensors refuse compressed ones if no quantizer reads them. May be called again."""
    load = getattr(core_model_loading, LOADER, None)
    if load is None or hasattr(load, "ria_checks"):  # None: another version; reading must not fail because of that
        return
    signature = inspect.signature(load)

    @functools.wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if getattr(given.get("load_config"), "hf_quantizer", "unknown") is None:
            _check_dense(given.get("model"), given.get("state_dict") or ())
        return load(*args, **kwargs)

    setattr(checked, "ria_checks", True)  # noqa: B010
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
            "quantization_config, so its weights would be random. (transformers leaves it out where a text decoder's "
            "class reads the folder of a model that also reads images or sound.) Load the whole model by its Auto "
            "class, and take the text decoder from it; or load the dense folder that `ria-vllm export` writes."
        )

"""ria-vllm: prune language models to 2:4 with RIA and channel permutation, and serve them with vLLM."""

__version__ = "0.2.0"

import importlib
from types import ModuleType

from ria_vllm.hf.install import install as _install

_install()


def __getattr__(name: str) -> ModuleType:
    """`ria_vllm.training` without another import, at no cost to those who do not train."""
    if name == "training":
        return importlib.import_module("ria_vllm.training")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

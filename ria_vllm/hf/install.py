"""Teaches Hugging Face's `from_pretrained` to read compressed folders, at no cost to those who never import
transformers.

`import ria_vllm` calls `install`. The quantizer itself (`ria_vllm.hf.quantizer`) is registered when transformers loads
its own quantizers, which may be now, later or never.
"""

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

TRIGGER = "transformers.quantizers.auto"


def install() -> None:
    """Register the quantizer, now or as soon as transformers loads its own. May be called again."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        import ria_vllm.hf.quantizer  # noqa: F401  (registers itself)
    except ImportError as error:  # importing transformers must still succeed
        warnings.warn(f"ria-vllm: this transformers cannot load compressed folders directly ({error})", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module that triggers the registration, as the other finders would.

    It stays among them, because an import may be interrupted and repeated.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TRIGGER:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if not isinstance(finder, _Finder))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader):
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()

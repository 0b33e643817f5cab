"""What a compression should do: every option that affects the result, checked and written into the checkpoint."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ria_vllm import __version__, formats
from ria_vllm.errors import RiaError
from ria_vllm.offline.model import dtypes
from ria_vllm.offline.pruning import permute, scores
from ria_vllm.offline.pruning.masks import Pattern
from ria_vllm.offline.publish import published
from ria_vllm.weight_format import WeightFormat

METHODS = (*scores.METHODS, "sparsegpt")
SCOPES = ("shared", "linear")
RECONSTRUCTIONS = ("none", "admm", "block")


@dataclass(frozen=True)
class Recipe:
    """The options; `ria-vllm compress --help` explains each.

    Raises:
        RiaError: an invalid value.
    """

    method: str = "ria"
    exponent: float = 0.5
    permute: str = "lsa"
    permute_scope: str = "shared"
    pattern: Pattern = Pattern(n=2, m=4)
    calibration: str = "self"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    ignore: tuple[str, ...] = ()
    reconstruct: str = "admm"
    skip_sensitive: float = 0.0
    weights: str = "float"
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        choices = (("method", METHODS), ("permute", permute.METHODS), ("permute_scope", SCOPES))
        more = (("reconstruct", RECONSTRUCTIONS), ("weights", formats.WRITTEN), ("compute_dtype", dtypes.CHOICES))
        for name, allowed in (*choices, *more):
            if getattr(self, name) not in allowed:
                option = "--" + name.replace("_", "-")
                raise RiaError(f"{option} {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        if self.weights != "float" and not self.served:
            raise RiaError(
                f"--weights {self.weights} is for the pattern 2:4; {self.pattern} is written as plain dense weights."
            )
        if self.samples < 1 or self.seq_len < 2:
            raise RiaError("--samples takes at least 1, --seq-len at least 2.")
        if not 0 <= self.skip_sensitive < 1:
            raise RiaError(f"--skip-sensitive {self.skip_sensitive}: give a fraction of at least 0 and less than 1.")
        if not 0 <= self.exponent <= 4:
            raise RiaError(f"--exponent {self.exponent}: choose a number from 0 to 4; the paper's is 0.5.")
        for expression in self.ignore:
            try:
                re.compile(expression)
            except re.error as error:
                raise RiaError(f"--ignore {expression!r}: not a regular expression ({error}).") from None

    @property
    def served(self) -> bool:
        """Whether a kernel serves the pattern. If not, weights are written as plain dense ones."""
        return (self.pattern.n, self.pattern.m) == (2, 4)

    @property
    def needs_gram(self) -> bool:
        return self.reconstruct != "none" or self.method == "sparsegpt" or self.skip_sensitive > 0

    @property
    def weight_format(self) -> WeightFormat:
        return formats.WRITTEN[self.weights]

    @property
    def follows_dense(self) -> bool:
        """Whether weights are updated towards the activations of the dense model on its own path."""
        return self.reconstruct != "none"

    @property
    def trains(self) -> bool:
        return self.reconstruct == "block"

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype of matrix products for which bfloat16 is precise enough: in training and permutation search."""
        return torch.float32 if self.compute_dtype == "float32" else torch.bfloat16

    def shared_orders(self, linears: Sequence[str]) -> list[Sequence[str]]:
        """The linears of a group, divided into those that share a channel order."""
        return [linears] if self.permute_scope == "shared" else [(name,) for name in linears]

    def with_seq_len(self, seq_len: int) -> "Recipe":
        return replace(self, seq_len=seq_len)

    def with_compute_dtype(self, dtype: str) -> "Recipe":
        return replace(self, compute_dtype=dtype)

    def ignores(self, name: str) -> bool:
        return any(re.search(expression, name) for expression in self.ignore)

    def dump(self, source: str) -> dict[str, Any]:
        """For config.json: enough to repeat the compression, without local paths."""
        versions = {"ria-vllm": __version__} | {name: version(name) for name in ("torch", "transformers", "scipy")}
        plain = {"pattern": str(self.pattern), "ignore": list(self.ignore), "calibration": Path(self.calibration).name}
        options = asdict(self) | plain
        if self.compute_dtype == "auto":
            del options["compute_dtype"]  # not chosen yet
        return options | {"source": published(source), "versions": versions}

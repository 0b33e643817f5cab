"""What `--pattern` and `--scheme` choose: what of each row is kept, and in how many bits.

A pattern keeps half of each so many neighbouring stored columns. Schemes are in the words of llm-compressor and vLLM:
bits of weights and of activations.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """`kept` weights of each group `of` neighbouring columns. A 2:4 matrix is a 4:8 matrix, and that an 8:16 matrix."""

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def group(self) -> str:
        """For messages."""
        return f"a group of {self.of} without exactly {self.kept} kept values"


TWO_OF_FOUR = Pattern(2, 4)
"""What GPUs multiply, too."""

PATTERNS = {str(one): one for one in (TWO_OF_FOUR, Pattern(4, 8), Pattern(8, 16))}
"""By what `--pattern` and config.json call them."""

SCHEMES: dict[str, dict[str, str]] = {
    "BF16": {"weights": "float", "activations": "none"},
    "W8A16": {"weights": "int8", "activations": "none"},
    "W8A8": {"weights": "int8", "activations": "int8"},
    "W4A16": {"weights": "int4", "activations": "none"},
    "W4A8": {"weights": "int4", "activations": "int8"},
    "FP8": {"weights": "fp8", "activations": "fp8"},
}
"""Scheme -> what the kept weights are stored as, and to what linears round their inputs. BF16 is the model's own dtype,
whatever it is."""

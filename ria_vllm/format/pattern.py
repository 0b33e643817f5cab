"""Patterns: of each so many neighbouring stored columns, every row keeps half."""

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

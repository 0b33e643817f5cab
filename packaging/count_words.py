"""Fail if the README or the pages for users have grown beyond what somebody reads: `make lint` runs it.

Words are what white space divides, code and tables included. The laboratory does not count.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {
    "README.md": (900, [ROOT / "README.md"]),
    "docs/*.md": (15_000, sorted(ROOT.glob("docs/*.md"))),
}


def main() -> int:
    """Print what is too long; the exit status."""
    status = 0
    for name, (limit, pages) in LIMITS.items():
        words = {page.name: len(page.read_text().split()) for page in pages}
        if sum(words.values()) > limit:
            each = ", ".join(f"{page} {count}" for page, count in words.items())
            print(f"{name}: {sum(words.values())} words, at most {limit} wanted ({each})", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

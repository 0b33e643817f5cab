"""Sizes in and out."""

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.files.sizes import human_size, parse_size


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1GiB", 2**30), ("7", 7), ("3K", 3000), ("9B", 9)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "1.5GB", "5XB", "GB"])
def test_invalid_sizes(text):
    with pytest.raises(RiaError, match="5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (1_234_567, "1.23 MB"), (5e12, "5 TB")],
)
def test_human_size(size, text):
    assert human_size(int(size)) == text

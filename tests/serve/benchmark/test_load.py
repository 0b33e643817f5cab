"""Which results of vLLM's benchmark are trusted."""

import json

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark.load import REPORTED, read_result

GOOD = {"completed": 8, "failed": 0, "errors": [""] * 8, "total_output_tokens": 128} | dict.fromkeys(REPORTED, 1.5)


def read(tmp_path, **changes):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(GOOD | changes))
    return read_result(path, requests=8, output_len=16)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"errors": ["", "Connection refused"]}, "Connection refused"),
        ({"completed": 7}, "7 of 8"),
        ({"failed": 1}, "completed"),
        ({"total_output_tokens": 127}, "127"),
        ({"p99_ttft_ms": None}, "p99_ttft_ms"),
        ({"output_throughput": float("inf")}, "output_throughput"),
        ({"output_throughput": float("nan")}, "output_throughput"),
    ],
)
def test_a_bad_result_has_no_figures(tmp_path, changes, words):
    with pytest.raises(RiaError, match=words):
        read(tmp_path, **changes)


def test_no_result(tmp_path):
    with pytest.raises(RiaError, match="nowhere.json"):
        read_result(tmp_path / "nowhere.json", 8, 16)


@pytest.mark.parametrize(("pieces", "is_whole"), [(4, True), (3, False)])
def test_an_answer_in_characters_of_four_tokens_is_whole(pieces, is_whole, tmp_path):
    """Where the server's counts are not read: a piece is a character at least, and that is four tokens at most."""
    path = tmp_path / "result.json"
    path.write_text(json.dumps(GOOD | {"duration": 2.0, "itls": [[0.1] * 15] * 7 + [[0.1] * (pieces - 1)]}))
    if is_whole:
        assert read_result(path, 8, 16, recount=True)["output_throughput"] == 8 * 16 / 2
    else:
        with pytest.raises(RiaError, match="an answer of 3 pieces"):
            read_result(path, 8, 16, recount=True)

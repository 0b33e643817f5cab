"""Which results of vLLM's benchmark are trusted."""

import json

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark.load import REPORTED, Workload, read_result

GOOD = {"completed": 8, "failed": 0, "errors": [""] * 8, "total_output_tokens": 128} | dict.fromkeys(REPORTED, 1.5)


def read(tmp_path, **changes):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(GOOD | changes))
    return read_result(path, requests=8, output_tokens=128)


def test_a_good_result(tmp_path):
    assert read(tmp_path) == dict.fromkeys(REPORTED, 1.5)


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
        read_result(tmp_path / "nowhere.json", 8, 128)


def test_workloads(tmp_path):
    random = Workload(input_len=32, output_len=16, requests_per_user=4).dataset_arguments()
    assert random == ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16"]
    sharegpt = Workload(32, 16, 4, tmp_path / "x.json").dataset_arguments()
    assert sharegpt[:4] == ["--dataset-name", "sharegpt", "--dataset-path", str(tmp_path / "x.json")]

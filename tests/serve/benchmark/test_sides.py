"""What the sides of a comparison are called."""

import json

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark.llama_cpp import LlamaCpp, vllm_threads
from ria_vllm.serve.benchmark.sides import sides_of


def names(*models) -> list[tuple[str, str]]:
    return [(side.name, side.model) for side in sides_of(models)]


def test_sides_are_called_like_their_folders_or_have_a_name():
    assert names("org/dense", "x/w8a8/", "2of4=out") == [("dense", "org/dense"), ("w8a8", "x/w8a8/"), ("2of4", "out")]


def test_a_pruned_folder_says_its_pattern_and_scheme(pruned_llama):
    found = sides_of([str(pruned_llama.source), str(pruned_llama.folder), "org/model"])
    assert [side.pruned for side in found] == ["", "2:4 BF16", ""]


def test_a_path_may_contain_an_equals_sign(tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert names(str(folder), "x=y/z=1") == [("a=b", str(folder)), ("x", "y/z=1")]
    assert names("x/a=b") == [("a=b", "x/a=b")]


def test_urls():
    assert names("http://h:8000/v1/", "x=https://a.b/c/v1#org/m") == [
        ("h:8000", "http://h:8000"), ("x", "https://a.b/c#org/m"),
    ]  # fmt: skip
    assert sides_of(["http://h:8000"])[0].bytes is None
    with pytest.raises(RiaError, match="--serve-args-of x: its server runs already, at http://h"):
        sides_of(["x=http://h"], [("x", "--dtype float32")])


@pytest.mark.parametrize(
    "url",
    ["http://me:SECRET@h/v1", "x=https://SECRET@h", "http://h/v1?key=SECRET", "http://a:S=SECRET@h",
     "http://me:SEC#SECRET@h/v1", "a/b=http://me:SECRET@h", "http://h#m?key=SECRET"],
)  # fmt: skip
def test_a_url_with_a_secret_is_refused_and_not_quoted(url):
    with pytest.raises(RiaError, match="VLLM_API_KEY") as found:
        sides_of(["dense", url])
    assert "SECRET" not in str(found.value)


@pytest.mark.parametrize("url", ["http://[::SECRET", "x=https:///SECRET"])
def test_what_only_looks_like_a_url(url):
    with pytest.raises(RiaError, match="no valid host") as found:
        sides_of(["dense", url])
    assert "SECRET" not in str(found.value)


def test_two_of_one_name():
    with pytest.raises(RiaError, match="x/a and y/a .*NAME=y/a"):
        sides_of(["x/a", "y/a", "z"])


def test_arguments_of_one_side():
    first, second, third = sides_of(
        ["bf16", "w8a8", "out"], [("w8a8", "--dtype float32"), ("w8a8", "--tokenizer 'a b'")]
    )
    assert second.arguments == ("--dtype", "float32", "--tokenizer", "a b") and not first.arguments + third.arguments
    with pytest.raises(RiaError, match="w4a16: no such side. There are bf16, w8a8"):
        sides_of(["bf16", "w8a8"], [("w4a16", "")])


@pytest.fixture
def eight_cores(tmp_path, monkeypatch):
    """A machine of eight cores with two threads each, of which this process may use those of the first four."""
    listed = [{"cpu": number, "core": number % 8, "node": 0} for number in range(16)]
    (tmp_path / "lscpu").write_text(f"#!/bin/sh\necho '{json.dumps({'cpus': listed})}'\n")
    (tmp_path / "lscpu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 8, 9, 10, 11})
    for name in ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    vllm_threads.cache_clear()
    yield
    vllm_threads.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("", "", 3), ("RESERVED_CPU", "0", 4), ("RESERVED_CPU", "2", 2),
        ("BIND", "auto", 3), ("BIND", "0-1,5", 3), ("BIND", "0-2|8-9", 5),
    ],
)  # fmt: skip
def test_llama_cpp_gets_as_many_threads_as_vllm(variable, value, expected, eight_cores, tmp_path, monkeypatch):
    names = {"RESERVED_CPU": "VLLM_CPU_NUM_OF_RESERVED_CPU", "BIND": "VLLM_CPU_OMP_THREADS_BIND"}
    if variable:
        monkeypatch.setenv(names[variable], value)
    (tmp_path / "m.gguf").touch()
    gguf = str(tmp_path / "m.gguf")
    found = sides_of(["org/model", gguf, "http://h:8000"])
    assert [side.threads for side in found] == [expected, expected, None]
    command = LlamaCpp().command(gguf, 1, [])
    assert command[command.index("--threads") + 1] == str(expected)

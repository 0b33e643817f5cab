"""What the sides of a comparison are called."""

import pytest

from ria_vllm.errors import RiaError
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

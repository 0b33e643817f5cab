"""Calibration tokens from files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration import data
from ria_vllm.offline.calibration.data import from_text

# No window of these occurs twice.
DOCUMENTS = [hashlib.sha256(bytes([i])).hexdigest()[: 40 + i % 20] for i in range(40)]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny("llama"))


def write(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in documents) + "\n\n")
    else:
        path.write_text("\n\n".join(documents) + "\n\n")
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_samples_are_windows_of_the_text_without_overlap(kind, tokenizer, tmp_path):
    path = write(tmp_path / f"text.{kind}", DOCUMENTS)
    tokens = from_text(str(path), tokenizer, samples=20, seq_len=50, seed=3)
    whole = "".join(f"{text}\n\n" for text in DOCUMENTS)
    starts = [whole.index(tokenizer.decode(row)) for row in tokens]
    assert tokens.shape == (20, 50) and tokens.dtype == torch.int32
    assert len(set(starts)) == 20 and all(start % 50 == 0 for start in starts)
    assert torch.equal(tokens, from_text(str(path), tokenizer, 20, 50, 3))
    assert not torch.equal(tokens, from_text(str(path), tokenizer, 20, 50, 4))


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_sample_starts_as_every_prompt_does(template, tokenizer, tmp_path):
    """Also where something follows each prompt, as in embedding models that are made from Mistral."""
    from tokenizers.processors import TemplateProcessing

    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokens = from_text(str(write(tmp_path / "text.txt", DOCUMENTS)), tokenizer, 5, 30, 0)
    assert tokens.shape == (5, 30)
    assert bool((tokens[:, 0] == 0).all()) and not bool((tokens[:, 1:] <= 1).any())


def test_chunks_of_a_long_text_join_seamlessly(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "text.txt", DOCUMENTS)
    whole = from_text(str(path), tokenizer, 20, 50, 0)
    monkeypatch.setattr(data, "CHUNK_CHARACTERS", 64)
    assert torch.equal(whole, from_text(str(path), tokenizer, 20, 50, 0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("text.csv", "a", "unknown file type"),
        ("text.txt", "a few words", "11 tokens make 0 samples of 50, but 20, held-out ones included, are needed"),
        ("text.txt", b"\xff\xfe\x00", "cannot be read"),
        ("text.jsonl", '{"text": "x"}\n{"body": "y"}', "line 2: no field 'text'"),
    ],
)
def test_unusable_texts(name, content, message, tokenizer, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RiaError, match=message):
        from_text(str(tmp_path / name), tokenizer, 20, 50, 0)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'\n  \n{"text": "a"}\n\n{"text": "b"}', ["a", "b"]),
        (b'{"text": "a\\r\\nb\\n"}\n', ["a\r\nb\n"]),
        (b'{"text": "2020-01-01 00:00:00"}\n{"text": "17"}\n{"text": ""}\n', ["2020-01-01 00:00:00", "17", ""]),
        (b'{"text": "a", "meta": {"text": [1]}}\n{"meta": "none", "text": "b"}\n', ["a", "b"]),
        (b'{"text": "a", "n": NaN}\n{"text": "\xc3\xa9\xe2\x80\xa8b"}\n', ["a", "\xe9\u2028b"]),
        (b'{"text": null}\n{"text": "b"}\n', ["b"]),
        (b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xef\xbb\xbfb"}\r\n', ["a", "\ufeffb"]),
    ],
)  # fmt: skip
def test_json_lines_in_every_spelling(content, texts, tmp_path):
    (tmp_path / "text.jsonl").write_bytes(content)
    assert list(data.documents(str(tmp_path / "text.jsonl"))) == [f"{text}\n\n" for text in texts]


@pytest.mark.parametrize(
    "line",
    [b'{"text": "b"} {}', b"null", b'["text"]', b"{}", b'{"text": 3}', b"[" * 100_000],
    ids=lambda line: line[:16],
)
def test_a_bad_line_is_named(line, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(RiaError, match=r"text\.jsonl, line 3: "):
        list(data.documents(str(path)))


def test_nulls_are_skipped_and_half_a_surrogate_pair_is_replaced(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": null}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert list(data.documents(str(path))) == ["a?b\n\n", "\N{GRINNING FACE}\n\n"]
    assert from_text(str(path), tokenizer, 1, 5, 0).shape == (1, 5)

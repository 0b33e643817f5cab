"""Data sets of the hub, and the commit that they are read at."""

import hashlib

import pytest
from hub_texts import NEW, OLD, install
from transformers import AutoTokenizer

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration import hub
from ria_vllm.offline.calibration.data import documents, from_text
from ria_vllm.offline.calibration.hub import opened

TEXTS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(40)]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("c4", [("allenai/c4", "en")]),
        ("wikitext2", [("Salesforce/wikitext", "wikitext-2-raw-v1"), ("download",)]),
        ("pile", [("monology/pile-uncopyrighted", None)]),
    ],
)
def test_what_is_streamed_is_not_downloaded(name, asked, tiny, monkeypatch):
    found = install(monkeypatch, **{OLD: TEXTS * 100})
    tokenizer, text = AutoTokenizer.from_pretrained(tiny("llama")), opened(name)
    assert (text.name, text.revision, found.asked) == (name, OLD, asked)
    assert from_text(text, tokenizer, samples=20, seq_len=50, seed=0).shape == (20, 50)
    assert len(TEXTS) < found.read < 200  # 8 times as many tokens as are asked for


def test_a_connection_that_breaks_while_rows_come_is_an_error_with_a_way_out(monkeypatch):
    found = install(monkeypatch, **{OLD: TEXTS})

    def rows(split):
        yield from ({"text": text} for text in TEXTS)
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(found, "rows", rows)
    with pytest.raises(RiaError, match=r"c4: allenai/c4 cannot .* \(Server Disconnected\). Give a text file"):
        list(documents(opened("c4")))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_without_a_connection_the_commit_is_that_in_the_cache(name, tmp_path, monkeypatch):
    """By the library itself, which then reads the latest that it has downloaded, also to stream it."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    repository, configuration, _ = hub.DATASETS[name]
    owner, title = repository.split("/")
    features = datasets.Features({"text": datasets.Value("string")})
    for commit, texts in ((NEW, TEXTS[:1]), (OLD, TEXTS)):  # as the library writes them
        folder = tmp_path / f"{owner}___{title}" / configuration / "0.0.0" / commit
        folder.mkdir(parents=True)
        with ArrowWriter(features=features, path=str(folder / f"{title}-train.arrow")) as writer:
            for text in texts:
                writer.write({"text": text})
            rows, size = writer.finalize()
        split = {"name": "train", "num_bytes": size, "num_examples": rows, "dataset_name": title}
        info = {"config_name": configuration, "dataset_name": title, "version": "0.0.0", "splits": {"train": split}}
        datasets.DatasetInfo(features=features, builder_name="parquet", **info).write_to_directory(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    text = opened(name)
    assert text.revision == OLD and list(documents(text)) == [f"{one}\n\n" for one in TEXTS]

"""`python -m benchmarks.finetune`: items by hand, what is right against greedy decoding, and every way."""

import json
import random

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import finetune
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.model.run.hf import load_model

CORPUS = """

\tThe/at Court/nn-tl of/in Oslo/np said/vbd ,/, ``/`` No/rb ''/'' ./.


\tIt/pps isn't/bez* Pat's/np$ !/.
"""


@pytest.fixture
def brown(tmp_path):
    folder = tmp_path / "brown"
    folder.mkdir()
    for number in range(40):
        (folder / f"ca{number:02}").write_text(CORPUS * 60)
    return folder


def answers(item):
    return [text for text, is_answer in item if is_answer]


def whole(item):
    return "".join(text for text, _ in item)


def test_parts_of_speech_are_those_of_brown_without_what_it_adds(brown):
    item = finetune.tagged(next(finetune.sentences([brown / "ca01"])))
    assert whole(item) == " The at Court nn of in Oslo np said vbd , , `` `` No rb '' '' . .\n"
    assert answers(item) == [" at", " nn", " in", " np", " vbd", " ,", " ``", " rb", " ''", " ."]


def test_a_sentence_loses_capitals_and_punctuation(brown):
    item = finetune.cased(next(finetune.sentences([brown / "ca01"])))
    assert whole(item) == "the court of oslo said no => The Court of Oslo said, No.\n"
    assert answers(item) == [" The", " Court", " of", " Oslo", " said,", " No."]


def test_an_order_is_the_same_as_json(brown):
    draw, seen = random.Random(0), set()
    for _ in range(200):
        item = finetune.ordered("Ada Bell", draw)
        text, _, found = whole(item).partition(" => ")
        order = json.loads(found)
        assert "".join(answers(item)) == f" {found.strip()}" and order["customer"] == "Ada Bell" and "Ada Bell" in text
        assert (order["city"] or "Ada") in text and str(order["day"]) in text
        for number in range(1, 3):
            if count := order.get(f"count {number}"):
                colour, one = order[f"colour {number}"], order[f"item {number}"]
                what = " ".join(filter(None, (colour, one if count == 1 else finetune._GOODS[one])))
                assert f"{count} {what}" in text or f"{finetune._CARDINALS[count - 1]} {what}" in text
        seen.add(tuple(order))
    assert len(seen) == 2  # one item or two


def test_an_answer_is_right_where_greedy_decoding_writes_it(tiny):
    """Windows of what the model itself writes, some tokens changed; the model decodes each answer again."""
    folder = str(tiny("llama"))
    model = load_model(folder, torch.device("cpu"), "auto")
    draw = torch.Generator().manual_seed(0)
    written = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=253, do_sample=False, eos_token_id=None)[0]
    tokens = torch.stack([written, written.roll(1)])
    changed = torch.rand(tokens.shape, generator=draw) < 0.1
    tokens[changed] = torch.randint(3, 90, (int(changed.sum()),), generator=draw)
    numbers = (torch.arange(256) // 3 % 2 * (torch.arange(256) // 6 + 1)).repeat(2, 1)  # three tokens, three of none
    numbers[1][numbers[1] > 0] += 1000
    right = []
    for window, of in zip(tokens, numbers, strict=True):
        for number in of.unique().tolist()[1:]:
            at = (of == number).nonzero().flatten().tolist()
            again = model.generate(window[None, : at[0]], max_new_tokens=len(at), do_sample=False, eos_token_id=None)
            right.append(torch.equal(again[0, at[0] :], window[at]))
    found = finetune.share_right(model, tokens, numbers)
    assert found["answers"] == len(right) and 0 < sum(right) < len(right)
    assert found["right"] == pytest.approx(sum(right) / len(right))


def test_no_answer_is_cut_by_a_window(tiny, brown):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    items = [finetune.tagged(one) for one in finetune.sentences([brown / "ca01"])]
    tokens, numbers, text = finetune.windows(iter(items), tokenizer, 3)
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for item in items for piece, _ in item]
    assert tokens.flatten().tolist() == [token for piece in ids for token in piece][: 3 * finetune.WINDOW]
    every = {answer for item in items for answer in answers(item)}
    known = {tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in every}
    flat = numbers.flatten()
    cut = flat[flat == flat[-1]] if flat[-1] else flat[:0]
    whole_ones = [tokens.flatten()[flat == one].tolist() for one in flat.unique().tolist() if one and one not in cut]
    assert len(whole_ones) > 100 and {tuple(one) for one in whole_ones} <= known
    assert all(
        len(row[row == one]) == len(flat[flat == one]) for row in numbers for one in row.unique().tolist() if one
    )
    assert text.startswith("The at Court nn of in")


@pytest.mark.slow
def test_every_way(tiny, brown, tmp_path, monkeypatch):
    """All ways of a tiny model learn, stay in their format, and a second run only reads their scores."""
    model, out = tiny("llama"), tmp_path / "runs"
    monkeypatch.setattr(finetune, "WINDOW", 128)
    options = ["--words", str(brown), "-o", str(out), "--task", "tags", "--rate", "1e-3", "--rate", "1e-2"]
    options += ["--steps", "12", "--tests", "2", "--seed", "0", "--distilled", "1024"]
    done = CliRunner().invoke(finetune.main, [str(model), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    folder = out / "tags" / "seed-0"
    scores = json.loads((folder / "scores.json").read_text())
    best = max(("dense-0.001", "dense-0.01"), key=lambda name: scores[name]["kept"]["right"])
    untrained = finetune.share_right(
        load_model(str(model), torch.device("cpu"), "auto"),
        *finetune.Runs(out, model, "tags", 0, brown, 12, 2).sets["test"][:2],
    )
    assert scores[best]["test"]["right"] > untrained["right"]
    sparse = max(("sparse-0.001", "sparse-0.01"), key=lambda name: scores[name]["kept"]["right"])
    assert scores[sparse]["test"]["right"] > untrained["right"]
    compressed = {way: f"{best}-{way}" for way in ("w8a8", "fast", "default")}
    for way, name in ({"dense": best, "distilled": f"{best}-default-distilled", "sparse": sparse} | compressed).items():
        shown = f"{100 * scores[name]['test']['right']:.2f} | {scores[name]['seconds']}"
        assert f"| tags | {way} | {shown} |" in done.output
        if way != "dense":
            assert list(Reader(folder / name).problems()) == []
    weight = AutoModelForCausalLM.from_pretrained(folder / sparse).model.layers[0].mlp.down_proj.weight
    assert (weight == 0).float().mean() >= 0.5
    monkeypatch.setattr(finetune, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(finetune.Runs, "command", lambda *_: pytest.fail("ran again"))
    assert done.stdout == CliRunner().invoke(finetune.main, [str(model), *options], catch_exceptions=False).stdout

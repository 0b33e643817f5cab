"""The model card: what it says, and that the base model's own card can neither break it nor inject anything."""

import json

import pytest
import yaml
from click.testing import CliRunner

from ria_vllm.folder_commands import export
from ria_vllm.hub.facts import PERPLEXITY, TASKS, add, add_speed
from ria_vllm.hub.model_card import base_repository, pruned_card, read_front_matter

RECIPE = {
    "method": "ria", "permute": "lsa", "pattern": "2:4", "scheme": "W8A8", "calibration": "/home/me/private/text.txt",
    "samples": 128, "seq_len": 512, "ignore": ["a|b"],
    "source": "/home/me/models/Base-1B", "versions": {"ria-vllm": "0.1.0", "torch": "2.13"},
}  # fmt: skip
REPORT = {
    "recipe": RECIPE,
    "linears": {
        "layers.0.q_proj": {"retained_after": 0.9},
        "layers.0.o_proj": {"retained_after": 0.6},
        "layers.1.q_proj": {"retained_after": 0.75},
        "layers.1.o_proj": {"retained_after": float("nan")},
    },
    "dense": {"lm_head": "not in a decoder layer", "layers.1.up": "--ignore"},
    "dense_in_int8": {"layers.1.up": {"int8": True}},
    "verdict": {"quality": "perplexity 25.50, dense 18.25", "size": "9 MB", "advice": "Try `best` <b>"},
}
BASE = """---
license: other
license_name: base-license
license_link: LICENSE
language:
- en
- "no"
tags: [chat, onnx, GGUF, mxfp4, "base_model:x/y", "arxiv:2402.1"]
pipeline_tag: text-generation
library_name: transformers
datasets: [their/data]
widget: [{text: hello}]
---
# Base
"""


def warnings_of(folder, text: str | bytes):
    """The front matter read from a card, and the warnings about it."""
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = []
    return read_front_matter(folder, said.append), said


def front_of(card: str):
    return yaml.safe_load(card.split("---\n")[1])


def card(folder, report=REPORT):
    text = pruned_card(folder, report, 0.4375, pytest.fail)
    assert "not measured" not in text
    return text


def test_license_language_and_tags_are_the_base_models(tmp_path):
    (tmp_path / "README.md").write_text(BASE)
    front = front_of(card(tmp_path))
    tags = front.pop("tags")
    assert front == {
        "license": "other", "license_name": "base-license", "license_link": "LICENSE", "language": ["en", "no"],
        "pipeline_tag": "text-generation", "library_name": "transformers",
    }  # fmt: skip
    assert tags == ["chat", "arxiv:2402.1", "ria-vllm", "pruned", "sparse", "vllm"]


def test_what_it_says(tmp_path):
    text = card(tmp_path)
    verdict = "- perplexity 25.50, dense 18.25\n- 9 MB\n- Try  best   b \n"
    parts = ["# Base-1B, pruned", verdict, "## Serve", "## What was pruned", "## Options"]
    assert sorted(parts, key=text.index) == parts
    assert "# Base-1B, pruned to 2:4\n" in text and "`Base-1B`, pruned by ria-vllm with RIA ([Zhang" in text
    assert "| pruned linears | 4 |" in text and "43.8% of the weights" in text
    assert "| retained score, mean | 0.7500 |" in text  # of the three that are numbers
    assert "| retained score, worst | 0.6000, `layers.0.o_proj` |" in text and "| left dense | `lm_head` |" in text
    assert "| dense in int8 | `layers.1.up` |" in text
    assert "| samples | `128` |" in text and "| calibration | `text.txt` |" in text and r"`a\|b`" in text
    assert '`pip install "ria-vllm[cuda]"` installs' in text and "\nvllm serve .\n" in text
    wheel = "https://github.com/vllm-project/vllm/releases/download/v0.32.0/vllm-0.32.0+cpu-cp38-abi3-manylinux"
    official = text.index(f"\nuv pip install --torch-backend cpu {wheel}_2_34_x86_64.whl ria-vllm\n")
    assert official < text.index('uv pip install --torch-backend cpu "ria-vllm[cpu]"\n')
    assert '".[' not in text and "clone" not in text  # strangers have none
    assert "/home" not in text and "private" not in text


def test_the_base_model_is_named_where_the_hub_has_it(tmp_path):
    cached = tmp_path / "models--org--Base-1B" / "snapshots" / "0123abcd"
    cached.mkdir(parents=True)
    assert base_repository("org/Base-1B", tmp_path) == "org/Base-1B"
    assert base_repository(str(cached), cached) == "org/Base-1B"  # the Hub's cache, given as a folder
    for local in ("Base-1B", "/home/me/org/Base-1B", "./org/Base-1B", "m.gguf", str(tmp_path)):
        assert base_repository(local, tmp_path) is None
    front = front_of(card(cached))
    assert front["base_model"] == "org/Base-1B" and front["base_model_relation"] == "quantized"
    assert "[org/Base-1B](https://huggingface.co/org/Base-1B), pruned" in card(cached)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("---\nlicense: [mit\n---\n", "flow sequence"),
        ("---\n" + "[" * 5000 + "\n---\n", "recursion"),
        ("---\nlicense: !!python/object/apply:os.system [touch hacked]\n---\n", "could not determine a constructor"),
        (b"---\nlicense: \xff\n---\n", "decode"),
    ],
)
def test_broken_front_matter_is_a_warning(text, says, tmp_path):
    front, said = warnings_of(tmp_path, text)
    assert front == {} and len(said) == 1 and says in said[0] and str(tmp_path / "README.md") in said[0]
    assert len(said[0].splitlines()) == 1


def test_only_short_strings_get_through(tmp_path):
    text = """---
license: {a: b}
license_link: [x]
language: [en, [de], {fr: it}, 12, null, ~, "two\\nlines", "%s"]
tags: x
library_name: null
---
""" % ("l" * 1000)
    front, said = warnings_of(tmp_path, text)
    assert front == {"language": "en", "tags": ["x"]} and said == []
    for empty in ("", "# A card without any\n", "---\n# only a comment\n---\n"):
        assert warnings_of(tmp_path, empty) == ({}, [])
    doubled = "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk"))
    assert warnings_of(tmp_path, f"---\na: &a [x,x]\n{doubled}tags: *k\n---\n") == ({}, [])


def test_names_cannot_break_out_of_the_table(tmp_path):
    """Nor reach a terminal as they are."""
    evil = "x` | <script>alert(1)</script>\n\n# Heading [a](http://b)\x1b[2J"
    linears = {evil: {"retained_after": 0.5}}
    report = {"recipe": RECIPE | {"source": evil, "method": evil}, "linears": linears, "dense": {evil: ""}}
    text = card(tmp_path, report=report)
    outside = text.split("## What was pruned")[0]
    assert "\x1b" not in text and r"\x1b[2J" in text
    assert "<script" not in outside and "\n# Heading" not in text and "](http://b)" not in outside
    worst = next(line for line in text.splitlines() if "retained score, worst" in line)
    assert worst.count("`") == 2 and worst.replace(r"\|", "").count("|") == 3


def test_an_exported_folder_has_a_card_of_its_own(damage, tmp_path):
    config = json.loads((damage.folder / "config.json").read_text())
    recipe = config["quantization_config"]["recipe"] | {"source": "org/Base-1B", "note": "\ud800"}  # JSON can hold it
    damage.edit_json("config.json", lambda c: c["quantization_config"].update(recipe=recipe))
    front = "license: mit\nbase_model: org/Base-1B\nbase_model_relation: quantized"
    (damage.folder / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    (damage.folder / "LICENSE").write_text("MIT")
    scores = {f"model.layers.{i}.mlp.up_proj": {"retained_after": score} for i, score in enumerate((0.5, 0.75))}
    report = {"linears": scores | {"elsewhere": {"retained_after": 0.1}}, "dense": 5}  # a stranger's, perhaps
    (damage.folder / "ria_report.json").write_text(json.dumps(report))
    done = CliRunner().invoke(export, [str(damage.folder), "-o", str(tmp_path / "dense")], catch_exceptions=False)
    text = (tmp_path / "dense" / "README.md").read_text()
    assert done.exit_code == 0 and (tmp_path / "dense" / "LICENSE").read_text() == "MIT"
    front = front_of(text)
    assert front["license"] == "mit" and front["base_model"] == "org/Base-1B" and "base_model_relation" not in front
    assert (
        "# Base-1B, pruned to 2:4, dense form" in text and "[org/Base-1B](https://huggingface.co/org/Base-1B)" in text
    )
    assert "vllm serve" not in text and "loads it without ria-vllm" in text
    assert "| pruned linears | 14 |" in text and "| sparsity | 2:4; 50.0% of the weights" in text
    assert "| retained score, mean | 0.6250 |" in text and "worst | 0.5000, `model.layers.0.mlp.up_proj` |" in text


def row(text: str, tokens: str, perplexity: str) -> dict[str, str]:
    return {"text": text, "tokens": tokens, "perplexity": perplexity}


def test_what_is_measured_is_added_to_report_and_card(tmp_path):
    """A row for each text, in whatever order it is measured; what somebody wrote around stays."""
    before = card(tmp_path).replace("## Serve", "Of my own.\n\n## Serve")
    (tmp_path / "README.md").write_text(before)
    (tmp_path / "ria_report.json").write_text(json.dumps({"verdict": REPORT["verdict"], "linears": {"a": {}}}))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.md").write_text("# One\n\n| users | side |\n|---|---|\n| 1 | a`<b |\n\nMedians.\n")
    add_speed(tmp_path, tmp_path / "bench" / "bench.md")
    for each in (row("brown.txt", "1000", "70.00"), row("wiki.txt", "500", "30.50"), row("brown.txt", "1000", "69.50")):
        add(tmp_path, PERPLEXITY, [each], key=("text", "tokens"))
    add(tmp_path, TASKS, [{"task": "earlier"}])
    add(tmp_path, TASKS, [{"task": "piqa", "recovery": "90%"}], "Of the harness.")
    add_speed(tmp_path, tmp_path / "bench" / "bench.md")
    after, report = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "ria_report.json").read_text())
    assert list(report) == ["verdict", "measured", "linears"] and report["verdict"] == REPORT["verdict"]
    assert report["measured"]["Speed"] == {"rows": [{"users": "1", "side": "a`<b"}]}
    assert report["measured"]["Benchmark tasks"]["rows"] == [{"task": "piqa", "recovery": "90%"}]
    assert [one["text"] for one in report["measured"]["Perplexity"]["rows"]] == ["wiki.txt", "brown.txt"]
    tables = ["| task | recovery |\n| --- | --- |\n| piqa | 90% |\n\nOf the harness."]
    tables += [
        "| text | tokens | perplexity |\n| --- | --- | --- |\n| wiki.txt | 500 | 30.50 |\n| brown.txt | 1000 | 69.50 |"
    ]
    parts = ["- perplexity 25.50", *tables, "| users | side |\n| --- | --- |\n| 1 | a  b |", "Of my own.", "## Serve"]
    assert [after.count(part) for part in parts] == [1] * 6 and sorted(parts, key=after.index) == parts
    assert "earlier" not in after and "70.00" not in after
    assert after.split("Of my own")[1] == before.split("Of my own")[1]
    assert after.split("- perplexity")[0] == before.split("- perplexity")[0]
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "ria_report.json", "bench"}


@pytest.mark.parametrize(
    "report",
    [{"verdict": 5, "measured": []}, {"measured": {"Speed": {"rows": [{}, 5, [], {"a|": "<b>"}, {"c": "d"}]}}}],
)
def test_a_strangers_report_breaks_no_card(report, tmp_path):
    text = card(tmp_path, REPORT | report)
    assert "<b>" not in text and ("| a  |" in text) == ("verdict" not in report)

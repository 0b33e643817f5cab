"""The report page: self-contained, correct for incomplete reports, safe for hostile ones."""

import json
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from ria_vllm.errors import RiaError
from ria_vllm.offline.evaluation.charts import Series, bar_chart, line_chart, ticks
from ria_vllm.offline.evaluation.report import page, report
from ria_vllm.schema import TOPOLOGY

VOID = {"meta"}


class Page(HTMLParser):
    """Collects tags and text, and checks that every element is closed in the right place."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def linears(layers: int = 3) -> dict:
    return {
        f"model.layers.{i}.{name}": {
            "shape": [64, 128], "retained_before": 0.7 + i / 100, "retained_after": 0.8 + i / 100,
            "error_before": 0.3, "error_after": 0.2,
        }
        for i in range(layers) for name in ("self_attn.q_proj", "mlp.down_proj")
    }  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(report, [str(a) for a in arguments], catch_exceptions=False)


def test_every_linear_is_a_point_of_its_chart_and_a_row():
    found = Page(page("model", {"linears": linears(3), "recipe": {"source": "hub/model"}}, None, []))
    assert found.tags.count("svg") == 4 and found.tags.count("circle") == 2 * 2 * 6  # score and error, before and after
    assert found.tags.count("tr") == 1 + 6 + 1
    assert "0.7100 → 0.8100" in found.text and "0.3000 → 0.2000" in found.text
    assert "pruned from hub/model" in found.text


def test_what_blocks_of_an_order_cost_is_a_column_where_it_was_measured():
    content = {"linears": linears(2)}
    assert "without blocks" not in Page(page("model", content, None, [])).text
    content["linears"]["model.layers.0.mlp.down_proj"]["retained_without_blocks"] = 0.8125
    found = Page(page("model", content, None, []))
    assert found.tags.count("th") == 9 and found.tags.count("td") == 4 * 9
    start = found.text.index("model.layers.0.mlp.down_proj", found.text.index("without blocks"))
    assert found.text[start + 1 :][:6] == ["64 x 128", "0.7000", "0.8000", "0.8125", "0.3000", "0.2000"]
    content["linears"]["model.layers.0.mlp.down_proj"]["retained_without_blocks"] = "<b>"  # nothing there is trusted
    assert "without blocks" not in Page(page("model", content, None, [])).text


def test_it_is_self_contained(damage):
    (damage.folder / "ria_report.json").write_text(json.dumps({"linears": linears(2)}))
    assert run(damage.folder).exit_code == 0
    text = (damage.folder / "ria_report.html").read_text()
    found = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href")] and "url(" not in text
    assert "0.665" in found.text and "4 + 6" in found.text  # sizes and permutations of the folder itself


@pytest.mark.parametrize(
    "content",
    [
        {"linears": {"a": {}}},
        {"linears": {"a": {"retained_before": None, "retained_after": "x"}}, "recipe": [], "dense": 3},
        {"linears": {"a.0.b": {"retained_before": float("nan"), "retained_after": 1.0, "shape": None}}},
        {"linears": [{"name": "a.0.b", "retained_before": 0.5, "retained_after": 0.5}]},
    ],
)
def test_incomplete_reports(content):
    assert "Linears" in Page(page("model", content, None, [])).text


def test_hostile_names_are_text():
    bad = '<script>alert("x")</script>'
    content = {
        "linears": {f"{bad}.0.{bad}": {"retained_before": 0.5, "retained_after": 0.6, "shape": [bad]}},
        "recipe": {"source": bad, bad: [bad]},
        "dense": {bad: bad},
    }
    text = page(bad, content, None, [{"perplexity": 4.5, "model": bad, "text": bad}])
    assert "script" not in Page(text).tags and "<script" not in text


def test_perplexities(damage, tmp_path):
    (damage.folder / "ria_report.json").write_text(json.dumps({"linears": linears(1)}))
    files = []
    for model, value in (("hub/dense", 42.125), (str(damage.folder), 66.5)):
        files.append(tmp_path / f"{value}.json")
        files[-1].write_text(json.dumps({"model": model, "text": "a.txt", "perplexity": value, "seq_len": 1024}))
    run(damage.folder, "-o", tmp_path / "page.html", "--perplexity", files[0], "--perplexity", files[1])
    found = Page((tmp_path / "page.html").read_text())
    assert "42.12" in found.text and "66.50" in found.text and "dense" in found.text
    files[0].write_text("{}")
    with pytest.raises(RiaError, match="eval --json"):
        run(damage.folder, "-o", tmp_path / "page.html", "--perplexity", files[0])


def test_perplexities_on_other_text_or_in_other_windows_are_in_another_chart():
    """Each under the name of its text: bars of one chart can be compared."""
    measured = [
        {"model": model, "text": f"texts/{text}.txt", "tokens": 8184, "seq_len": window, "perplexity": value}
        for model, text, window, value in (
            ("dense", "corpus", 1024, 40.5), ("dense", "reference", 1024, 12.75), ("dense", "corpus", 512, 44.25),
            ("sparse", "corpus", 1024, 56.5), ("sparse", "reference", 1024, 34.0),
        )
    ]  # fmt: skip
    found = Page(page("model", {"linears": {"a": {}}}, None, measured))
    shown = found.text[found.text.index("Perplexity") + 1 : found.text.index("Retained score")]
    heads = [f"{text}.txt: 8184 tokens predicted, in windows of {window}; lower is better."
             for text, window in (("corpus", 1024), ("reference", 1024), ("corpus", 512))]  # fmt: skip
    assert shown == [
        heads[0], "dense", "40.50", "sparse", "56.50", heads[1], "dense", "12.75", "sparse", "34.00", heads[2],
        "dense", "44.25",
    ]  # fmt: skip


def test_each_distillation_is_a_row_of_the_recipe():
    """With what it sets, in words."""
    first = {"teacher": "dense", "lr": 0.0003, "eval_text": [], "micro_batch": None, "versions": {"torch": "2.9"}}
    runs = [first, {"teacher": "dense", "kept_step": 0, "eval_text": ["a.txt", "b.txt"]}]
    content = {"linears": {"a": {}}, "recipe": {"method": "ria", TOPOLOGY: [{"a": 1}], "distill": runs}}
    found = Page(page("model", content, None, []))
    start = found.text.index("method")
    assert found.text[start : start + 6] == [
        "method", "ria", "distill, run 1", "teacher dense, lr 0.0003, versions torch 2.9",
        "distill, run 2", "teacher dense, kept_step 0, eval_text a.txt, b.txt",
    ]  # fmt: skip


@pytest.mark.parametrize("named", [True, False])
def test_a_link_is_replaced_and_what_it_leads_to_stays(damage, tmp_path, named):
    """The page may be a link into the cache that a hub's folder comes from, or to what others read."""
    page, target = tmp_path / "page.html" if named else damage.folder / "ria_report.html", tmp_path / "target"
    (damage.folder / "ria_report.json").write_text(json.dumps({"linears": linears(2)}))
    target.write_text("mine")
    page.symlink_to(target)
    run(damage.folder, *(["-o", page] if named else []))
    assert target.read_text() == "mine" and not page.is_symlink() and page.read_text().startswith("<!doctype html>")


def test_bad_input(damage):
    with pytest.raises(RiaError, match="ria_report.json: missing"):
        run(damage.folder)
    (damage.folder / "ria_report.json").write_text("{}")
    with pytest.raises(RiaError, match="lists no linear"):
        run(damage.folder)
    (damage.folder / "ria_report.json").write_text(json.dumps({"linears": linears(1)}))
    for output, words in (("absent/page.html", "there is no folder absent"), (damage.folder, "a folder")):
        with pytest.raises(RiaError, match=words):
            run(damage.folder, "-o", output)


@pytest.mark.parametrize("low, high", [(0, 1), (0.71, 0.83), (3, 3), (0, 1e-9), (-5, 1200)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 7 and all(low - 1e-9 <= t <= high * (1 + 1e-6) + 1e-9 for t in found)


def test_charts_with_one_point_or_none_at_all():
    Page(line_chart("t", [Series("a", "after", [(0, 0.0)])], "layer"))
    Page(bar_chart("t", [("a", 0.0, "0", "after")]))
    Page(bar_chart("t", []))


def curve() -> list[dict]:
    held_out = [{"brown.txt": {"perplexity": 70 - step, "kl": 0.6 - step / 100}} for step in (0, 8, 16)]
    points = [{"step": s, "tokens": 512 * s, "held_out": h} for s, h in zip((0, 8, 16), held_out)]
    zero = {"hidden": 0.0, "text": 0.0}
    return [points[0], points[1] | zero | {"kl": 0.7}, points[2] | zero | {"kl": 0.5}]


def test_a_distillation_is_three_curves_against_tokens():
    found = Page(page("model", {"linears": linears(1), "distill": [{"curve": curve()}]}, None, []))
    assert "Recovery" in found.text
    for tip in ("loss: kl, tokens 8192: 0.5", "brown.txt: perplexity, tokens 4096: 62", "brown.txt: KL, tokens 0: 0.6"):
        assert tip in found.text
    assert "loss: kl, tokens 0" not in " ".join(found.text)
    assert "Recovery" not in Page(page("model", {"linears": linears(1)}, None, [])).text


def test_a_divergence_of_the_top_k_is_another_curve():
    """Beside that of a run whose divergence is over the whole vocabulary."""
    other = [{"tokens": 1, "held_out": {"brown.txt": {"perplexity": 70.0, "kl_top_k": 0.25}}}]
    runs = [{"curve": curve()}, {"curve": other}]
    found = Page(page("model", {"linears": linears(1), "distill": runs}, None, []))
    assert "brown.txt: KL of the top k, tokens 1: 0.25" in found.text
    assert any("compares the k most probable tokens one by one and all others as one" in text for text in found.text)
    alone = Page(page("model", {"linears": linears(1), "distill": runs[:1]}, None, []))
    assert not any("most probable tokens" in text for text in alone.text)


def test_each_term_of_the_loss_that_counts_is_a_curve():
    """Those of other weights are 0 throughout, and are left out."""
    points = [point | {"text": 3.0 - number, "kl": 0.0, "hidden": 0.0} for number, point in enumerate(curve())]
    found = Page(page("model", {"linears": linears(1), "distill": [{"curve": points}]}, None, []))
    assert "loss: text, tokens 8192: 1" in found.text
    assert [text for text in found.text if text.startswith("loss: ") and "," not in text] == ["loss: text"]


@pytest.mark.parametrize(
    "hostile",
    [
        "x", {}, [1], [{}], [{"curve": "x"}], [{"curve": [1, {}]}], [{"curve": [{"tokens": "<b>", "kl": 1}]}],
        [{"curve": [{"tokens": 1, "held_out": {"<script>": {"kl": 1.0}}}]}],
        [{"curve": [{"tokens": 1, "held_out": {"a": 1, "b": {"kl": float("nan")}}}]}],
    ],
    ids=repr,
)  # fmt: skip
def test_a_hostile_curve_is_escaped_or_left_out(hostile):
    found = Page(page("model", {"linears": linears(1), "distill": hostile}, None, []))
    assert "script" not in found.tags

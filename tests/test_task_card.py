"""The model card's section of benchmark scores: where it goes, and what it leaves alone."""

from dataclasses import replace

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.hub.model_card import Measured, note_perplexity
from ria_vllm.task_card import Average, Score, note_tasks

ROW = Score("arc", "acc_norm", 50, 0, 0.45, 0.02, 0.5, 0.03, 90.0)
PERPLEXITY = Score("words", "perplexity", 50, 0, 30.0, 2.0, 10.0, 1.0, None)
MEAN = Average({"arc": "acc_norm"}, 0.45, 0.5, 90.0)
SECTION = "<!-- ria-vllm: perplexity -->\nnone\n<!-- ria-vllm: end of perplexity -->"
CARD = f"# Mine\n\n## Perplexity\n\n{SECTION}\n\n## Options\n"


def card(folder) -> str:
    return (folder / "README.md").read_text()


def test_scores_come_after_the_perplexity_and_replace_those_of_an_earlier_run(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    note_tasks(tmp_path, [replace(ROW, task="earlier")], None, "lm-evaluation-harness 0.1")
    note_tasks(tmp_path, [PERPLEXITY, ROW], MEAN, "lm-evaluation-harness 0.2")
    text = card(tmp_path)
    head, tail = "\n\n## Benchmark tasks\n\n", "\n\n## Options\n"
    assert text.startswith(CARD.removesuffix(tail) + head) and text.endswith(tail) and text.count(head) == 1
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| task | metric | examples | score | base model | recovery |",
        "| --- | --- | --- | --- | --- | --- |",
        "| words | perplexity | 50, 0-shot | 30.0000 ± 2.0000 | 10.0000 ± 1.0000 |  |",
        "| arc | acc_norm | 50, 0-shot | 0.4500 ± 0.0200 | 0.5000 ± 0.0300 | 90.0% |",
        "| mean of 1 task | acc_norm |  | 0.4500 | 0.5000 | 90.0% |",
    ]
    assert "harness 0.2" in text and "without subtracting the level of chance" in text and "earlier" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_perplexity_and_scores_do_not_disturb_each_other(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    note_tasks(tmp_path, [ROW], MEAN, "h")
    scores = card(tmp_path).split("## Benchmark tasks")[1]
    note_perplexity(tmp_path, Measured("brown.txt", 1000, 64, 70.0, 40.0))
    assert card(tmp_path).split("## Benchmark tasks")[1] == scores and "| brown.txt | 1000 | 64 |" in card(tmp_path)


def test_a_card_of_another_program_gets_the_section_at_its_end(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    note_tasks(tmp_path, [replace(ROW, dense=None, dense_error=None, recovery=None)], None, "h")
    assert card(tmp_path).startswith("# Mine\n\n## Benchmark tasks\n\n")
    assert "| arc | acc_norm | 50, 0-shot | 0.4500 ± 0.0200 |  |  |" in card(tmp_path) and "Recovery" not in card(
        tmp_path
    )


def test_names_cannot_break_out_of_the_table(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    note_tasks(tmp_path, [replace(ROW, task="a|b\n<script>")], None, "h")
    assert "| a b  script  | acc_norm |" in card(tmp_path)


def test_where_there_is_no_card_nothing_can_be_noted(tmp_path):
    with pytest.raises(RiaError, match="README.md: no model card"):
        note_tasks(tmp_path, [ROW], None, "h")

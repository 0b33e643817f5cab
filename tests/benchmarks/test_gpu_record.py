"""What counts of several attempts at a part of gpu_session."""

from benchmarks.gpu_record import Record


def test_the_attempt_that_says_most_counts(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    for outcome, numbers in (("cut", [1, 2]), ("cut", [3]), (None, [4])):
        record.start("part")
        for number in numbers:
            record.add("part", "section", {"number": number})
        if outcome:
            record.end("part", outcome)
    assert record.rows() == [{"number": 1}, {"number": 2}]
    assert Record(tmp_path / "other.jsonl").rows() == [] and not (tmp_path / "other.jsonl").exists()
    for outcome, number in (("failed", 5), ("failed", 6)):
        record.start("part")
        record.add("part", "section", {"number": number})
        record.end("part", outcome)
    assert Record(record.path).rows("section") == [{"number": 6}]
    record.start("part")
    record.end("part", "passed")
    assert Record(record.path).rows() == [] and Record(record.path).passed == {"part"}

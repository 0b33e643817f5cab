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


def test_times_of_attempts_that_did_not_pass_are_kept(tmp_path):
    """A failure with few rows after a cut attempt with many; then an attempt that passed."""

    def attempt(outcome, *rows):
        record.start("part")
        for row in rows:
            record.add("part", "decode", row)
        record.end("part", outcome)

    def timed(tokens, us):
        return {"model": "m", "tokens": tokens, "us": us}

    record = Record(tmp_path / "record.jsonl")
    failed = {"part": "part", "error": "illegal access", "ok": False}
    attempt("cut", timed(1, 1.0), timed(8, 2.0), timed(64, 3.0))
    attempt("failed", timed(1, 1.5), failed)
    attempt("cut", timed(1, 1.6), timed(8, 2.5))
    assert record.outcomes == {"part": "failed"}
    assert record.rows("decode") == [timed(1, 1.5), failed, timed(8, 2.5), timed(64, 3.0)]
    attempt("passed", timed(1, 1.7))
    assert record.rows() == [timed(1, 1.7)]

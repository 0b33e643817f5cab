"""The course of a run, and that it survives being written."""

from ria_vllm.offline.distill.state import Course


def test_the_curve_holds_means_since_the_last_point():
    course = Course()
    course.add([2.0, 4.0], 2)
    course.add([4.0, 2.0], 4)
    held_out = {"a": {"perplexity": 10.0, "kl": 0.5}}
    wanted = {"step": 2, "tokens": 6, "kl": 1.0, "text": 1.0, "held_out": held_out}
    assert course.point(6, held_out) == wanted
    course.add([3.0, 0.0], 1)
    assert course.point(7, {})["kl"] == 3.0


def judged(*losses: float, patience: int) -> tuple[Course, list[bool]]:
    """The course after these held-out losses, the first of which is that of the start; whether each was the best."""
    course, found = Course(), []
    for step, loss in enumerate(losses):
        course.step = step
        found.append(course.judge(loss, patience))
        assert not course.stopped or step == len(losses) - 1
    return course, found


def test_it_stops_after_as_many_worse_measurements_in_a_row_as_allowed():
    course, found = judged(3.0, 2.0, 2.5, 1.5, 1.6, patience=2)
    assert found == [True, True, False, True, False] and not course.stopped and course.best == (3, 1.5)
    assert not course.judge(1.5, patience=2) and course.stopped


def test_a_rise_above_the_start_is_no_reason_to_stop_while_the_loss_falls():
    course, found = judged(1.0, 1.5, 1.4, 1.3, 1.2, 0.9, 0.8, patience=2)
    assert found == [True, False, False, False, False, True, True] and not course.stopped
    course, found = judged(1.0, 1.5, 1.6, 1.7, patience=2)
    assert found == [True, False, False, False] and course.stopped and course.best == (0, 1.0)

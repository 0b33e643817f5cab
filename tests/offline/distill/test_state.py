"""The course of a run."""

from math import exp

from ria_vllm.offline.distill.state import Course


def test_the_curve_holds_means_since_the_last_point():
    course, held_out = Course(), {"a": {"perplexity": 10.0, "kl": 0.5}}
    course.add((2.0, 5.0, 4.0))
    course.add((1.0, 3.0, 1.0))
    means = {"kl": 1.5, "perplexity": exp(4.0), "perplexity_dense": exp(2.5)}
    assert course.point(6, held_out) == {"step": 2, "tokens": 6, "held_out": held_out} | means
    course.add((3.0, 1.0, 1.0))
    assert course.point(7, {})["kl"] == 3.0


def test_the_step_with_the_lowest_divergence_is_kept():
    course, found = Course(), []
    for course.step, loss in enumerate([3.0, 2.0, 2.5, 1.5, 1.6]):
        found.append(course.judge(loss))
    assert found == [True, True, False, True, False] and course.best == (3, 1.5) and course.kept == 3

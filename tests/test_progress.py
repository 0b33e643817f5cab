"""What a user sees of a long command: lines through a pipe, bars on a terminal. Most tests use a clock of their own."""

import os
import subprocess
import sys
import threading
import time

import pytest

from ria_vllm import progress
from ria_vllm.progress import EVERY, POLL, Monitor


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def run(self, seconds, monitor):
        """Let time pass for the printing thread, second by second."""
        for _ in range(seconds):
            self.now += 1
            monitor.tick()


@pytest.fixture
def clock():
    return Clock()


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_phase_of_a_single_step_is_named_at_least_every_15_seconds(clock, capsys):
    monitor = Monitor(clock=clock)
    with monitor.phase("permutations"):
        shown = []
        for _ in range(4):
            clock.run(15, monitor)
            shown += [lines(capsys)]
    assert EVERY + POLL <= 15
    assert all(shown) and all("permutations" in line for each in shown for line in each)
    assert "... permutations (0:10)" in shown[0]
    clock.run(100, monitor)
    assert lines(capsys) == []  # nothing goes on


def test_steps_and_layers_show_count_time_and_eta(clock, capsys):
    monitor = Monitor(clock=clock)
    for index in monitor.layers(range(2, 30), 30):  # the first two were done by an earlier run
        for _ in monitor.steps(range(4), "calibration passes", 4):
            clock.run(2, monitor)
        if index == 4:
            break
    shown = lines(capsys)
    assert shown[0] == "... decoder layers 3/30 (0:10, ETA 4:30), calibration passes 0/4 (0:02)"
    assert shown[1] == "... decoder layers 4/30 (0:20, ETA 4:20), calibration passes 1/4 (0:04, ETA 0:12)"


def test_lines_printed_within_a_phase_and_times_of_nested_phases(clock, capsys):
    monitor = Monitor(clock=clock)
    with monitor.phase("calibration text"):
        clock.run(3, monitor)
        for _ in monitor.steps(range(2), "sampling the model", 2):
            clock.run(20, monitor)
            monitor.say("[bold]a line[/bold]")
        clock.run(2, monitor)
    assert monitor.seconds == {"calibration text": 5.0, "sampling the model": 40.0}
    shown = lines(capsys)
    assert shown.count("[bold]a line[/bold]") == 2
    assert "... calibration text (0:40), sampling the model 1/2 (0:37, ETA 0:37)" in shown


def test_one_that_is_not_shown_is_silent(clock, capsys):
    monitor = Monitor(shown=False, clock=clock)
    with monitor.live(), monitor.phase("permutations"):
        assert not [t for t in threading.enumerate() if t.name == "progress"]
        clock.run(100, monitor)
        monitor.warn("anything")
    assert lines(capsys) == []


def test_the_thread_prints_and_ends_with_its_command(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "POLL", 0.01)
    monitor = Monitor()
    with pytest.raises(ZeroDivisionError), monitor.live(), monitor.phase("permutations"):
        seen = ""
        while "permutations" not in seen:
            seen += capsys.readouterr().err
            time.sleep(0.01)
        raise ZeroDivisionError
    assert not [t for t in threading.enumerate() if t.name == "progress"]


SCRIPT = """
import sys, time
from ria_vllm import progress
progress.EVERY, progress.POLL = 0.05, 0.01
monitor = progress.Monitor()
with monitor.live():
    with monitor.phase("loading the model"):
        time.sleep(0.4)
    for index in monitor.layers(range(3), 3):
        for _ in monitor.steps(range(4), "calibration passes", 4):
            time.sleep(0.05)
        monitor.say(f"layer {index} " + "x" * 150)
print("done")
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_standard_error_without_a_reader_costs_no_result(closed):
    read, write = os.pipe()
    os.close(read)
    command = [f'exec "{sys.executable}" -c "$0" {"2>&-" if closed else ""}', SCRIPT]
    done = subprocess.run(["sh", "-c", *command], stdout=subprocess.PIPE, stderr=write, text=True, timeout=60)
    os.close(write)
    assert (done.stdout, done.returncode) == ("done\n", 0)

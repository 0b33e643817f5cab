"""Processes that start, stop and die at random moments around one output folder, for tests/offline/test_work.py.

`python owners.py FOLDER SEED ROUNDS` lets a few of them run in each round, and decides who goes on: each process waits
before everything that it does with a file. So one seed gives one order of what happens. Processes that are not killed
take part in later rounds.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ria_vllm.errors import RiaError
from ria_vllm.offline.run.work import work_folder
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.stored_layers import layer_key

KEYS = ["calibration", layer_key(0), layer_key(1)]
RUNS = 2  # with different options
DEATHS = 0.015  # of each time that a process waits
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}
LOOKS = {"open", "os.listdir", "os.scandir", "shutil.rmtree"}
# What a process may end with besides a result -> what the error then says.
REFUSALS = {
    "busy": "another process is writing here", "exists": "exists already", "appeared": "appeared during the run",
    "other run": "is from a run with another run", "stopped": "told to stop",
}  # fmt: skip


@dataclass
class Part:
    """What one process does in one round.

    Attributes:
        who: a number that no other part has.
        run: the number of its options.
        stops: after so many units, with an error or by Ctrl-C.
        by_hand: by Ctrl-C.
    """

    who: int
    run: int
    resume: bool
    overwrite: bool
    stops: int | None
    by_hand: bool


class Worker:
    """A process, as the one sees it that decides who goes on."""

    def __init__(self, out: Path):
        self.here, there = Pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self.here.close()
            try:
                serve(out, there)
            finally:
                os._exit(1)
        there.close()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.here.close()


class Waiting:
    """In a worker: counts what it may do before it has to wait, and says what it has done."""

    def __init__(self, out: Path, pipe: Connection):
        self.folder, self.work, self.pipe = str(out.parent), f"{out}.partial", pipe
        self.part: Part | None = None
        self.left, self.done = 0, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.part is None or event not in CHANGES | LOOKS | {"fcntl.lockf"}:
            return
        paths = [] if event == "fcntl.lockf" else [arguments[0]]
        if event == "os.rename":
            paths.append(arguments[1])
        if event in ("os.remove", "os.rmdir") and arguments[-1] >= 0:  # as shutil.rmtree does
            paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fspath(arguments[0]))]
        paths = [os.fspath(path) for path in paths if not isinstance(path, int)]
        if event != "fcntl.lockf" and not any(path.startswith(self.folder) for path in paths):
            return
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        self.step("write" if writes else event, *paths)

    def step(self, *what: Any) -> None:
        # What comes to the lock and the folder that it is in, where owners change, is always waited for.
        if not self.left or {"fcntl.lockf", self.work, f"{self.work}/lock"}.intersection(what):
            self.pipe.send(("waits", self.done))
            self.left, self.done = self.pipe.recv(), []
        self.left -= 1
        self.done.append(what)


def serve(out: Path, pipe: Connection) -> None:
    """Do the parts that are asked for. Says of each how it ends, and what has been done since it waited last."""
    os.fsync = lambda _: None  # a killed process loses nothing that it has written
    torch.set_num_threads(1)
    waiting = Waiting(out, pipe)
    while True:
        waiting.part = part = pipe.recv()
        try:
            waiting.step("begins")
            take_part(out, part, waiting)
            end = "finished"
        except KeyboardInterrupt:
            end = "stopped"
        except RiaError as error:
            end = next((end for end, words in REFUSALS.items() if words in str(error)), str(error))
        except BaseException:
            end = traceback.format_exc()
        waiting.part = None
        pipe.send((end, waiting.done))
        waiting.left, waiting.done = 0, []


def take_part(out: Path, part: Part, waiting: Waiting) -> None:
    with work_folder(out, {"run": part.run}, part.overwrite, part.resume, Ranks()) as writer:
        waiting.step("owns", *(key for key in KEYS if writer.has(key)))
        for number, key in enumerate(KEYS):
            if number == part.stops:
                raise KeyboardInterrupt if part.by_hand else RiaError("told to stop.")
            if not writer.has(key):
                writer.write(key, {key: torch.tensor([part.run, part.who])})
        writer.finish(KEYS, {"config.json": {"who": part.who}}, [], max_shard_size=40)


@dataclass
class Round:
    """What happens in one round, and whether it may.

    Attributes:
        units: who may have written units of the work folder: (their run, who goes on from whom).
        changes: who -> when it changed what is in the folders, first and last.
    """

    out: Path
    parts: list[Part]
    units: tuple[int, set[int]]
    story: list[tuple[Any, ...]] = field(default_factory=list)
    changes: dict[int, tuple[int, int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)

    def note(self, part: Part, done: list[tuple[Any, ...]]) -> None:
        for what, *details in done:
            self.story.append((part.who, what, *details))
            if what == "owns":
                self._owns(part, details)
            elif what in CHANGES | {"write"} and any(self._inside(Path(path)) for path in details):
                first, _ = self.changes.get(part.who, (len(self.story), 0))
                self.changes[part.who] = (first, len(self.story))
        if ("os.rename", str(self.work / "final"), str(self.out)) in done:
            self._check_result(part)

    @property
    def work(self) -> Path:
        return self.out.with_name("out.partial")

    def _inside(self, path: Path) -> bool:
        """Whether it is what only the owner may touch. The work folder itself and its lock are how one becomes it."""
        return self.out in (path, *path.parents) or (self.work in path.parents and path != self.work / "lock")

    def _owns(self, part: Part, found: list[str]) -> None:
        run, writers = self.units
        assert not found or (part.resume and run == part.run), f"{part.who} goes on from units of another run: {found}"
        self.units = (part.run, {part.who} | (writers if part.resume and run == part.run else set()))

    def _check_result(self, part: Part) -> None:
        files = self.out.glob("*.safetensors")
        tensors = {key: value.tolist() for path in files for key, value in load_file(path).items()}
        assert tensors.keys() == set(KEYS), tensors
        assert {run for run, _ in tensors.values()} == {part.run}, tensors
        assert {who for _, who in tensors.values()} <= self.units[1], (tensors, self.units)
        assert json.loads((self.out / "config.json").read_text()) == {"who": part.who}

    def check(self, there: bool) -> None:
        """At its end.

        Args:
            there: whether there was a result before.
        """
        assert set(self.ends.values()) <= {"finished", "killed", *REFUSALS}, self.ends
        spans = sorted((span, who) for who, span in self.changes.items())
        for ((_, last), one), ((first, _), other) in pairwise(spans):
            assert last < first, f"{one} and {other} changed the folders at the same time"
        if "killed" in self.ends.values():
            return
        assert set(self.ends.values()) != {"busy"}, "each was refused for the others"
        if len(self.parts) == 1:
            (part,), (end,) = self.parts, self.ends.values()
            expected = {"exists"} if there and not part.overwrite else {"finished", "stopped", "other run"}
            assert end in expected - ({"finished"} if part.stops is not None else {"stopped"}), end
            if end == "finished":
                assert os.listdir(self.out.parent) == ["out"]


def play(workers: list[Worker], chance: random.Random, happens: Round) -> None:
    playing = dict(zip((part.who for part in happens.parts), workers))
    left = {part.who: part for part in happens.parts}
    for part in happens.parts:
        playing[part.who].here.send(part)
        assert playing[part.who].here.recv() == ("waits", [])
    while left:
        part = left[chance.choice(sorted(left))]
        worker = playing[part.who]
        if chance.random() < DEATHS:
            worker.kill()
            workers[workers.index(worker)] = Worker(happens.out)
            happens.ends[part.who] = "killed"
            del left[part.who]
            continue
        worker.here.send(chance.choice((1, 1, 5, 100)))
        state, done = worker.here.recv()
        happens.note(part, done)
        if state != "waits":
            happens.ends[part.who] = state
            del left[part.who]


def main(folder: Path, seed: int, rounds: int) -> None:
    chance, out, seen, who = random.Random(seed), folder / "out", Counter(), 0
    gc.collect()
    gc.freeze()
    workers = [Worker(out) for _ in range(3)]
    units: tuple[int, set[int]] = (0, set())
    for number in range(rounds):
        if chance.random() < 0.5:
            shutil.rmtree(out, ignore_errors=True)
        parts = []
        for _ in range(chance.choice((1, 2, 2, 3))):
            who += 1
            resume, overwrite, by_hand = (chance.random() < share for share in (0.5, 0.75, 0.5))
            stops = chance.choice((None, None, None, *range(len(KEYS))))
            parts.append(Part(who, chance.randrange(RUNS), resume, overwrite, stops, by_hand))
        there, happens = out.exists(), Round(out, parts, units)
        try:
            play(workers, chance, happens)
            happens.check(there)
        except BaseException:
            print(f"round {number} of seed {seed}:", *parts, *happens.story, happens.ends, sep="\n", flush=True)
            traceback.print_exc()
            os._exit(1)
        units = happens.units
        seen.update(happens.ends.values())
    for worker in workers:
        worker.kill()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

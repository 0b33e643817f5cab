"""The writer: a folder appears whole or not at all, and nothing finished is lost."""

import fcntl
import hashlib
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from ria_vllm.checkpoint import writer as writers
from ria_vllm.checkpoint.lock import delete_locked, locked
from ria_vllm.checkpoint.writer import CheckpointWriter, check_place, write_whole
from ria_vllm.errors import RiaError

TENSORS = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}


def written(out, max_shard_size=10**9, **options) -> CheckpointWriter:
    writer = CheckpointWriter(out, **options)
    for name, tensor in TENSORS.items():
        writer.write(name, {name: tensor}, record={"loss": 1.5})
    writer.finish(list(TENSORS), {"config.json": {"a": 1}}, {}, max_shard_size)
    return writer


def test_shards_hold_at_most_their_size_and_the_index_names_all(tmp_path):
    written(tmp_path / "out", max_shard_size=900)  # 400 bytes a tensor
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 and set(index["weight_map"]) == set(TENSORS)
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], TENSORS[name])


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    beginnings = {name: tensor.numpy().tobytes()[:65536] for name, tensor in tensors.items()}
    return hashlib.sha256(b"".join(name.encode() + b"\0" + beginnings[name] for name in sorted(beginnings))).hexdigest()


@pytest.mark.parametrize("units", [[["a", "b"], ["c"]], [["c", "b"], ["a"]]])
def test_the_digest_of_weights_is_that_of_their_beginnings_in_any_order(tmp_path, units):
    tensors = {"a": torch.arange(100_000, dtype=torch.int32), "b": torch.ones(3), "c": torch.tensor(2)}
    writer = CheckpointWriter(tmp_path / "out")
    for number, names in enumerate(units):
        writer.write(str(number), {name: tensors[name] for name in names})
    writer.finish(["0", "1"], {"config.json": {"quantization_config": {"quant_method": "ria"}}}, {}, 10**9)
    digest = weights_digest(tensors)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ria_weights_digest": digest}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"quantization_config": {"quant_method": "ria", "weights_digest": digest}}


@pytest.mark.parametrize("permutations", [{"a": [1, 0, 2], "b": [0, 2, 1]}, {}])
def test_one_digest_binds_config_shards_and_permutations(tmp_path, permutations):
    """Also where the recipe permutes and no permutation turned out to be worth storing."""
    units = {f"{name}.input_permutation": torch.tensor(p, dtype=torch.int32) for name, p in permutations.items()}
    writer = CheckpointWriter(tmp_path / "out")
    writer.write("u", TENSORS | units)
    config = {"quantization_config": {"quant_method": "ria"}}
    writer.finish(["u"], {"config.json": config}, {}, max_shard_size=900, permuted=True)
    content = b"".join(name.encode() + b"\0" + struct.pack("<3i", *p) for name, p in sorted(permutations.items()))
    digest = hashlib.sha256(content).hexdigest()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    digests = {"permutations_digest": digest, "weights_digest": weights_digest(TENSORS)}
    assert written["quantization_config"] == {"quant_method": "ria"} | digests
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"} | {f"ria_{name}": found for name, found in digests.items()}


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RiaError, match="exists already.*--overwrite"):
        CheckpointWriter(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_name_that_safetensors_would_not_read_is_refused_before_any_work(tmp_path):
    """It writes there, so the error would come at the end."""
    out = tmp_path / os.fsdecode(b"out\xff")
    with pytest.raises(RiaError, match="udcff: this name is not UTF-8. Choose another output folder."):
        CheckpointWriter(out)
    assert not list(tmp_path.iterdir())
    CheckpointWriter(tmp_path / "\xf6ut").close()


@pytest.mark.parametrize("letter", ["x", "\N{LATIN SMALL LETTER A WITH DIAERESIS}"])
def test_a_name_that_no_file_system_takes_is_refused_before_any_work(letter, tmp_path):
    with pytest.raises(RiaError, match="too long .*Choose a shorter"):
        check_place(tmp_path / (letter * 250), tmp_path)
    check_place(tmp_path / (letter * 100), tmp_path / "source")


def test_overwrite_replaces_only_at_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    writer = CheckpointWriter(out, overwrite=True)
    writer.write("u", TENSORS)
    assert (out / "old.txt").exists()
    writer.finish(["u"], {}, {}, 10**9)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"] and list(tmp_path.iterdir()) == [out]


def test_overwrite_of_a_link_leaves_its_target(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "keep.txt").write_text("keep")
    (tmp_path / "out").symlink_to(target)
    written(tmp_path / "out", overwrite=True)
    assert (target / "keep.txt").exists() and not (tmp_path / "out").is_symlink()


def test_resume_keeps_finished_units_and_their_records(tmp_path):
    CheckpointWriter(tmp_path / "out").write("t0", {"t0": TENSORS["t0"]}, record={"loss": 1.5})
    again = CheckpointWriter(tmp_path / "out", resume=True)
    assert again.has("t0") and not again.has("t1") and again.record("t0") == {"loss": 1.5}
    tensors, record = again.read("t0")
    assert torch.equal(tensors["t0"], TENSORS["t0"]) and record == {"loss": 1.5}
    assert not CheckpointWriter(tmp_path / "out").has("t0")


def test_an_unrelated_partial_folder_is_left_alone(tmp_path):
    unrelated = tmp_path / "out.partial"
    unrelated.mkdir()
    (unrelated / "mine.txt").write_text("mine")
    with pytest.raises(RiaError, match="holds something else"):
        CheckpointWriter(tmp_path / "out")
    assert (unrelated / "mine.txt").exists()


def test_out_that_appears_meanwhile_is_not_destroyed(tmp_path):
    writer = CheckpointWriter(tmp_path / "out")
    writer.write("u", TENSORS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RiaError, match="appeared"):
        writer.finish(["u"], {}, {}, 10**9)
    assert (tmp_path / "out" / "mine.txt").exists()


def test_killed_at_the_end_leaves_nothing_half_written(tmp_path):
    """The process dies while shards are copied: OUT does not exist, and the units serve the next run."""
    script = f"""
import os, torch
from pathlib import Path
from ria_vllm.checkpoint import shards, writer
w = writer.CheckpointWriter(Path({str(tmp_path / "out")!r}))
for i in range(5):
    w.write(f"t{{i}}", {{f"t{{i}}": torch.full((100,), float(i))}})
copy = shards.copy_tensors
def die(*arguments):
    copy(*arguments)
    os.kill(os.getpid(), {int(signal.SIGKILL)})
shards.copy_tensors = die
w.finish([f"t{{i}}" for i in range(5)], {{}}, {{}}, 900)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    writer = CheckpointWriter(tmp_path / "out", resume=True)
    assert all(writer.has(name) for name in TENSORS)
    writer.finish(list(TENSORS), {}, {}, 10**9)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(TENSORS)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_limit_on_file_size_while_saving(tmp_path):
    """safetensors reports the system's error as text: it must become a message too."""
    writer = CheckpointWriter(tmp_path / "out")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(RiaError, match="cannot write .*too large"):
            writer.write("u", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not writer.has("u")


@pytest.fixture
def busy(tmp_path):
    """Another process, which has begun to write `out` and then waits; calling it ends that process."""
    (ready, begun), (wait, end) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            writer = CheckpointWriter(tmp_path / "out")
            writer.write("t0", {"t0": TENSORS["t0"]})
            os.write(begun, b"x")
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.read(ready, 1)

    def finish():
        if finish.waits:
            finish.waits = False
            os.write(end, b"x")
            os.waitpid(child, 0)

    finish.waits = True
    yield finish
    finish()


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_do_not_write_one_folder(tmp_path, busy, resume):
    """The units of the one would be taken for those of the other."""
    with pytest.raises(RiaError, match="out.partial: another process is writing here.*another output folder"):
        CheckpointWriter(tmp_path / "out", resume=resume)
    busy()
    assert CheckpointWriter(tmp_path / "out", resume=resume).has("t0") is resume


def processes_that_may_die(out: Path, numbers: list[int], draw: random.Random) -> tuple[list[int], int]:
    """A process for each number, which writes `out` full of it, unless it is refused or dies at some event of its. They
    begin together when the returned descriptor is closed."""
    waits, begins = os.pipe()
    children = [process_that_may_die(out, number, draw.randint(1, 150), (waits, begins)) for number in numbers]
    os.close(waits)
    return children, begins


def process_that_may_die(out: Path, number: int, at: int, pipe: tuple[int, int]) -> int:
    child = os.fork()
    if child:
        return child
    os.close(pipe[1])
    os.read(pipe[0], 1)
    events = 0

    def hook(event, _):
        nonlocal events
        events += event == "open" or event.startswith(("os.", "shutil.", "fcntl."))
        if events == at:
            os._exit(DIED)

    def released(folder, lock):
        os.close(owner)
        delete_locked(folder, lock)

    try:
        owner = os.open(out.with_name("owner"), os.O_CREAT | os.O_RDWR)
        os.fsync = lambda _: None  # nothing here is about the machine's end
        sys.addaudithook(hook)
        with suppress(RiaError):
            writer = CheckpointWriter(out, overwrite=True)
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            writers.delete_locked = released
            for unit in TENSORS:
                writer.write(unit, {unit: torch.full((100,), float(number))})
            writer.finish(list(TENSORS), {"config.json": {"number": number}}, {}, 1000)
            os._exit(DONE)
        os._exit(REFUSED)
    except BaseException:
        traceback.print_exc()
        os._exit(WRONG)


DONE, REFUSED, DIED, WRONG = range(4)


@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_two_processes_that_die_at_any_moment_share_nothing(tmp_path, rounds):
    """The result is whole and of one of them, and a finished one is there until the next is."""
    out, draw, ends = tmp_path / "out", random.Random(rounds), Counter()
    expected = None
    pairs = [[2 * number, 2 * number + 1] for number in range(rounds)]
    following = processes_that_may_die(out, pairs[0], draw)
    for numbers, others in zip(pairs, [*pairs[1:], []]):
        children, begins = following
        os.close(begins)
        following = processes_that_may_die(out, others, draw)  # meanwhile: to fork takes as long as to write
        found = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        ends.update(found)
        assert WRONG not in found
        if DONE in found or expected is not None:
            # Whoever died between two renames has left the former result where the next run finds it.
            place = out if out.exists() else out.with_name("out.partial") / "replaced"
            number = json.loads((place / "config.json").read_text())["number"]
            tensors = [one for path in place.glob("model*.safetensors") for one in load_file(path).items()]
            assert {name for name, _ in tensors} == set(TENSORS)
            assert all(bool((tensor == number).all()) for _, tensor in tensors)
            assert number in numbers or (number == expected and DONE not in found)
            expected = number
    os.close(following[1])
    assert set(ends) == {DONE, REFUSED, DIED} and min(ends.values()) >= rounds // 20, ends


def test_who_opened_a_lock_before_it_was_deleted_does_not_have_the_new_folder(tmp_path, monkeypatch):
    def late(*arguments):
        monkeypatch.undo()
        delete_locked(folder, first)
        others.append(locked(folder))
        return fcntl.lockf(*arguments)

    folder, others = tmp_path / "folder", []
    first = locked(folder)
    monkeypatch.setattr(fcntl, "lockf", late)
    found = locked(folder)
    assert os.path.samestat(os.fstat(found.fileno()), os.stat(folder / "lock"))


@pytest.mark.parametrize("left", [[], ["lock"]])
def test_a_work_folder_that_a_killed_process_was_deleting(tmp_path, left):
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).touch()
    written(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_run_killed_with_the_replaced_folder_beside_its_units_can_be_resumed(tmp_path):
    written(tmp_path / "out")
    CheckpointWriter(tmp_path / "out", overwrite=True).write("t0", {"t0": TENSORS["t0"]})
    (tmp_path / "out.partial" / "replaced").mkdir()
    (tmp_path / "out.partial" / "replaced" / "model.safetensors").touch()
    written(tmp_path / "out", overwrite=True, resume=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_writer_that_has_finished_deletes_no_folder_of_others(tmp_path):
    writer = written(tmp_path / "out")
    CheckpointWriter(tmp_path / "out", overwrite=True).write("t0", {"t0": TENSORS["t0"]})
    writer.discard()
    assert (tmp_path / "out.partial" / "units" / "t0.safetensors").exists()


def test_a_text_file_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "page").symlink_to("target")
    (tmp_path / "page.tmp").symlink_to("target")
    write_whole(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text() == "new" and not (tmp_path / "page").is_symlink()
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "page.tmp").is_symlink()

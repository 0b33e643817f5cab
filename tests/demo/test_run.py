"""`make demo` with a tiny model instead of SmolLM2."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.serve.benchmark import engines, load
from ria_vllm.serve.benchmark.load import Workload
from ria_vllm.serve.benchmark.machine import machine
from ria_vllm.serve.benchmark.results import Run
from ria_vllm.serve.benchmark.sides import Side

PROGRAM = Path(__file__).parents[2] / "demo" / "run.py"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The program as a module, with a working folder of its own."""
    spec = spec_from_file_location("demo_run", PROGRAM)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BEGAN = 0.0
    module.WORK, module.DENSE, module.SPARSE = tmp_path, tmp_path / "tiny", tmp_path / "tiny-2of4"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return module


def figures(speed: float, memory: int) -> dict[str, float]:
    times = {"p50_ttft_ms": 1000 / speed, "p50_tpot_ms": 500 / speed}
    return {"output_throughput": speed, "memory_bytes": memory} | times


def rows(text: str) -> dict[str, list[str]]:
    """First column -> the other ones."""
    cuts = ((36, 48), (48, 60), (60, None))
    return {line[:36].strip(): [line[i:j].strip() for i, j in cuts] for line in text.splitlines()}


SIDES = [Side("dense", "D", 200_000_000), Side("sparse", "S", 150_000_000)]
PERPLEXITY = {"dense": 20.0, "sparse": 30.0}


def test_the_table_has_both_sides_and_their_ratio(demo):
    measured = [("sparse", 1, 50, 3), ("sparse", 8, 200, 4), ("dense", 1, 25, 4), ("dense", 8, 160, 8)]
    runs = [Run(side, 0, users, figures(speed, size << 30)) for side, users, speed, size in measured]
    found = rows(demo.summary(runs, SIDES, PERPLEXITY))
    assert found[""] == ["dense", "sparse", "sparse / dense"]
    assert found["perplexity, lower is better"] == ["20.0", "30.0", "1.50"]
    assert found["tokens/s, 1 user"] == ["25.0", "50.0", "2.00"]
    assert found["tokens/s, 8 users"] == ["160.0", "200.0", "1.25"]
    assert found["time to the first token, 1 user"] == ["40 ms", "20 ms", "0.50"]
    assert found["time per further token, 8 users"] == ["3.1 ms", "2.5 ms", "0.80"]
    assert found["weight files"][2] == "0.75" and found["memory of the server"][2] == "0.50"
    assert max(map(len, demo.summary(runs, SIDES, PERPLEXITY).splitlines())) <= 80


def test_a_folder_that_cannot_be_read_is_made_again(demo, pruned_llama, monkeypatch, capfd):
    """Such as one by an older version, whose config.json has no digest of the permutations."""
    shutil.copytree(pruned_llama.folder, demo.SPARSE)
    config = json.loads((demo.SPARSE / "config.json").read_text())
    del config["quantization_config"]["permutations_digest"]
    (demo.SPARSE / "config.json").write_text(json.dumps(config))
    demo.RIA_VLLM = [sys.executable, "-c", "import sys; print(sys.argv[1:])"]
    demo.compress()
    said = capfd.readouterr().out
    assert "exists already" not in said and "'--overwrite'" in said and "permutations_digest" in said


def test_a_perplexity_is_reused_for_the_same_text_arguments_and_model(demo, capfd):
    """A mock of `eval` prints the number of its calls. Output that is not JSON is not kept."""
    demo.DENSE.mkdir()
    config, count, demo.TEXT = demo.DENSE / "config.json", demo.WORK / "count", demo.WORK / "text.txt"
    count.touch()
    config.write_text("{}")
    demo.TEXT.write_text("a text")
    program = f"f = open({str(count)!r}, 'a'); f.write('x'); print('{{\"perplexity\": %d}}' % f.tell())"
    demo.RIA_VLLM = [sys.executable, "-c", "print('no JSON')"]
    with pytest.raises(ValueError):
        demo.perplexity(demo.DENSE)
    demo.RIA_VLLM = [sys.executable, "-c", program]
    assert [demo.perplexity(demo.DENSE) for _ in range(2)] == [1, 1]
    demo.TEXT.write_text("another text")
    assert [demo.perplexity(demo.DENSE) for _ in range(2)] == [2, 2]
    demo.EVAL_ARGUMENTS = ["--json"]
    assert [demo.perplexity(demo.DENSE) for _ in range(2)] == [3, 3]
    config.write_text('{"quantization_config": {}}')
    assert [demo.perplexity(demo.DENSE) for _ in range(2)] == [4, 4]


def test_the_message_about_a_server_that_does_not_answer_names_its_log(demo, monkeypatch):
    @contextmanager
    def server(*_, **__):
        yield SimpleNamespace(startup=1.0, url="http://127.0.0.1:1", model_name="m")

    def continuation(server):
        raise openai.APIConnectionError(message="Connection error.", request=None)

    monkeypatch.setattr(demo, "running_server", server)
    monkeypatch.setattr(demo, "continuation", continuation)
    monkeypatch.setattr(demo, "everything", lambda: demo.serve("sparse", demo.SPARSE, demo.WORK, [], print))
    with pytest.raises(SystemExit, match=r"Connection error.*logs/sparse-server\.log"):
        demo.main()


def test_the_download_of_the_model_gets_pip_args(demo, monkeypatch):
    """The download fails here, and ends in a message."""
    commands = []

    def run(command, check):
        commands.append(command)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PIP_ARGS", "--find-links '/a folder' -q")
    with pytest.raises(SystemExit, match="pip"):
        demo.main()
    assert commands[0][-4:] == ["--find-links", "/a folder", "-q", demo.PACKAGE]


class StandIns:
    """A demo whose models are ready and whose commands are replaced: `vllm` by tests/serve/vllm_stand_in.py, `ria-vllm`
    by a few lines of `inspect` and a perplexity."""

    def __init__(self, demo, pruned_llama, monkeypatch, capfd):
        self.demo, self.events, self.capfd = demo, demo.WORK / "events", capfd
        shutil.copytree(pruned_llama.source, demo.DENSE)
        shutil.copytree(pruned_llama.folder, demo.SPARSE)
        program = "import sys; print('{\"perplexity\": 20}' if sys.argv[1] == 'eval' else 'linear\\n\\ntotals')"
        demo.RIA_VLLM = [sys.executable, "-c", program]
        vllm = [sys.executable, str(PROGRAM.parents[1] / "tests" / "serve" / "vllm_stand_in.py")]
        monkeypatch.setattr(load, "VLLM", vllm)
        monkeypatch.setattr(engines, "VLLM", vllm)
        monkeypatch.setenv("STAND_IN_EVENTS", str(self.events))

    def run(self) -> tuple[list[str], str, str]:
        """The demo: vLLM's commands that it started (such as "serve tiny" and "bench 8"), what it printed, and its last
        step."""
        self.events.write_text("")
        self.demo.main()
        said = self.capfd.readouterr().out
        return self.started(), said, said[said.rindex("\n===") :].partition("\n")[2].partition("\n")[2]

    def started(self) -> list[str]:
        started = []
        for words in map(str.split, self.events.read_text().splitlines()):
            served = words[0] == "serve"
            started.append(f"serve {Path(words[1]).name}" if served else f"bench {words[words.index(USERS) + 1]}")
        return started


USERS = "--max-concurrency"
EVERYTHING = ["serve tiny-2of4", "bench 1", "bench 8", "serve tiny", "bench 1", "bench 8"]


@pytest.fixture
def stand_ins(demo, pruned_llama, monkeypatch, capfd):
    return StandIns(demo, pruned_llama, monkeypatch, capfd)


def test_a_second_run_prints_the_same_and_starts_nothing(stand_ins):
    started, said, last = stand_ins.run()
    assert started == EVERYTHING and "measured before" not in said
    (folder,) = stand_ins.demo.WORK.glob("bench-*")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    started, again, last_again = stand_ins.run()
    assert started == [] and before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert again.count(" was measured before\n") == 2
    date = json.loads((folder / "bench.json").read_text())["date"].replace("T", " at ")
    note = f"(measured before, last on {date}; again after `rm -r {folder}`)\n"
    assert note in last_again and last_again.replace(note, "") == last
    assert f"plot: {folder / 'bench.png'}" in last
    for text in ("\ndense: ... east\n", "\nsparse: ... east\n"):
        assert text in said and text in again
    shutil.rmtree(folder)
    assert stand_ins.run()[0] == EVERYTHING


def test_what_may_change_the_figures_gets_measurements_of_its_own(stand_ins, monkeypatch):
    monkeypatch.delenv("RIA_VLLM_CPU_ISA", raising=False)
    demo, here = stand_ins.demo, machine()
    first = demo.measurements(here)
    assert first == demo.measurements(here | {"date": "another"}) and first.parent == demo.WORK
    found = {first, demo.measurements(here | {"processor": "another"})}
    monkeypatch.setenv("RIA_VLLM_CPU_ISA", "avx2")
    found.add(demo.measurements(here))
    demo.SERVE_ARGUMENTS = ["--max-model-len", "256"]
    found.add(demo.measurements(here))
    demo.WORKLOAD = Workload(16, 8, 1)
    found.add(demo.measurements(here))
    demo.USERS = (1, 2)
    found.add(demo.measurements(here))
    for path in (next(demo.SPARSE.glob("model*.safetensors")), demo.DENSE / "config.json"):
        os.utime(path, (0, 0))
        found.add(demo.measurements(here))
    kernel = demo.WORK / "kernels" / "cpu.so"
    kernel.parent.mkdir()
    demo.PROGRAMS = [kernel.parent]
    found.add(demo.measurements(here))
    kernel.touch()
    found.add(demo.measurements(here))
    assert len(found) == 10


def test_what_was_measured_before_an_interruption_is_kept(stand_ins, monkeypatch):
    """Between the two servers, between two loads, and where a load failed."""
    demo, start, load_it = stand_ins.demo, stand_ins.demo.running_server, load.online

    def running_server(model, *rest, **more):
        if model == str(demo.DENSE):
            raise KeyboardInterrupt
        return start(model, *rest, **more)

    def online(server, tokenizer, workload, users, *rest):
        if users == 8:
            raise KeyboardInterrupt
        return load_it(server, tokenizer, workload, users, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "running_server", running_server)
        stand_ins.run()
    assert stand_ins.started() == EVERYTHING[:3]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(load, "online", online)
        stand_ins.run()
    assert stand_ins.started() == ["serve tiny", "bench 1"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="broken on purpose"):
        patch.setenv("STAND_IN_BREAK", "8")
        stand_ins.run()
    assert stand_ins.started() == ["serve tiny", "bench 8"]
    started, _, last = stand_ins.run()
    assert started == ["serve tiny", "bench 8"] and "(measured before, in part, last on " in last
    assert rows(last)["tokens/s, 8 users"] == ["80.0", "80.0", "1.00"]
    assert stand_ins.run()[0] == []


@pytest.mark.slow
def test_from_a_model_to_the_table_with_two_servers(demo, tiny_llama, tmp_path, monkeypatch, capfd):
    """A second run reuses everything."""
    demo.DENSE.symlink_to(tiny_llama)
    demo.COMPRESS_ARGUMENTS = ["--samples", "2", "--seq-len", "64"]
    demo.EVAL_ARGUMENTS = ["--seq-len", "128", "--eval-tokens", "512", "--json"]
    demo.SERVE_ARGUMENTS = ["--max-model-len", "256", "--enforce-eager"]
    demo.WORKLOAD, demo.USERS = Workload(16, 8, 1), (2,)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no worker process beside the engine's
    served, start = [], demo.running_server

    def running_server(model, *rest, **more):
        served.append(model)
        return start(model, *rest, **more)

    monkeypatch.setattr(demo, "running_server", running_server)
    demo.main()
    first = capfd.readouterr().out
    assert served == [str(demo.SPARSE), str(demo.DENSE)]
    assert Reader(demo.SPARSE).sparse_names
    table, _, last = first[first.rindex("\n===") :].partition("\nplot: ")
    table, _, note = table.partition("\n(")
    assert "vLLM with --enforce-eager; one run each, 1 request per user)" in note
    found = rows("\n".join(table.splitlines()[2:]))
    assert len(found) == 7 and not [cell for cells in found.values() for cell in cells if cell in ("failed", "-")]
    assert float(found["perplexity, lower is better"][0]) > 1
    assert Path(last.split(";")[0]).is_file() and last.endswith("all figures and logs are in the same folder\n")
    assert first.count("healthy after") == 2 and "\ndense: ... " in first and "\nsparse: ... " in first

    # A second run that starts any program fails.
    def refuse(*arguments, **_):
        raise AssertionError(arguments)

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    demo.fetch_model()
    demo.compress()
    again = {demo.perplexity(model) for model in (demo.DENSE, demo.SPARSE)}
    said = capfd.readouterr().out
    assert said.count("exists already") == 2 and said.count("measured before") == 2
    assert {f"{value:.1f}" for value in again} == set(found["perplexity, lower is better"][:2])

"""Runs of serve/generate.py in processes that are forked from one that has imported vLLM.

That import takes as long as twenty small models. `python forked.py` is the process that has done it: it reads a line of
JSON for each call of `run`, and writes one when these runs are over. There is one for each process of pytest, and it
ends with that. (`preloaded` has processes without vLLM.)
"""

import atexit
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

_servers: dict[str | None, "Server"] = {}


def run(runs: list[dict[str, Any]], timeout: float) -> list[int]:
    """The exit statuses of runs that happen at the same time. If one fails, the others are killed.

    A run: {"arguments": of generate.py, "environment": what it has besides this one, "log": path}. The engine is in its
    process.
    """
    common = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    runs = [one | {"environment": common | one["environment"]} for one in runs]
    threads = runs[0]["environment"].get("OMP_NUM_THREADS")  # which is read as torch is imported
    if threads not in _servers:
        _servers[threads] = Server({} if threads is None else {"OMP_NUM_THREADS": threads})
    try:
        return _servers[threads].ask(runs, timeout)
    except BaseException:
        _servers.pop(threads).end()
        raise


class Server:
    def __init__(self, environment: dict[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")
        # All models are folders here, and this is read as huggingface_hub is imported.
        environment = os.environ | environment | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log,
        )  # fmt: skip
        atexit.register(self.end)

    def ask(self, runs: list[dict[str, Any]], timeout: float) -> list[int]:
        assert self.process.stdin and self.process.stdout
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(runs) + "\n")
            self.process.stdin.flush()
            in_time, _, _ = select.select([self.process.stdout], [], [], timeout)
            if not in_time:
                logs = "\n".join(Path(one["log"]).read_text()[-5000:] for one in runs)
                raise TimeoutError(f"vLLM runs for more than {timeout:.0f} s: {logs}")
            answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise RuntimeError(f"the process with vLLM has ended: {self.log.read()[-5000:]}")
        return json.loads(answer)

    def end(self) -> None:
        atexit.unregister(self.end)
        self.process.kill()
        self.process.wait()


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve() -> list[str]:
    """Returns in the process of each run, with its arguments."""
    import generate

    end_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)
    generate.prepare()
    gc.freeze()  # what is not looked at for garbage stays shared
    for line in sys.stdin:
        runs = json.loads(line)
        sys.stdout.flush()
        processes = []
        for one in runs:
            process = os.fork()
            if not process:
                end_with_parent()
                os.close(answers)
                os.environ.clear()
                os.environ.update(one["environment"])
                log = os.open(one["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
                    os.dup2(source, target)
                return one["arguments"]
            processes.append(process)
        os.write(answers, f"{json.dumps(statuses(processes))}\n".encode())
    os._exit(0)


def statuses(processes: list[int]) -> list[int]:
    """Their exit statuses, once all have ended."""
    found: dict[int, int] = {}
    while set(processes) - set(found):
        process, status = os.wait()
        if process not in processes:  # something that the imports have started
            continue
        found[process] = os.waitstatus_to_exitcode(status)
        if status:
            for other in set(processes) - set(found):
                os.kill(other, signal.SIGKILL)
    return [found[process] for process in processes]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "serve"))
    import generate

    generate.main(*serve())

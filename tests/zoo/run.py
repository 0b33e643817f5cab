"""Run the zoo: `python -m zoo.run RESULTS.json [--work FOLDER] [--dense] [MODEL_TYPE ...]`.

Each type's record is kept in the work folder, so an interrupted run continues. Once all are there, they go to the
results. `--dense` only asks whether vLLM and transformers agree on the dense toys.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zoo.agreement import agreement, agreement_of_two, job
from zoo.check import is_loose, problems
from zoo.family import dense_folder, pruned_folders
from zoo.serving import serve
from zoo.toy import Toy, fingerprint
from zoo.toys import TOYS

from ria_vllm.installing import name_vllm

BATCH = 16  # toys whose folders are there at the same time, and that one process of vLLM serves


def attempt(record: dict[str, Any], step: str, run: Callable[[], Any]) -> Any:
    """What `run` returns; None if it failed, and then the record says why."""
    start = time.monotonic()
    try:
        return run()
    except Exception as error:  # the next type goes on
        record[step] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        return None
    finally:
        seconds = record.setdefault("seconds", {})
        seconds[step] = round(seconds.get(step, 0) + time.monotonic() - start, 1)


def run_batch(names: list[str], work: Path, dense_only: bool) -> dict[str, Any]:
    """model type -> its record."""
    records: dict[str, Any] = {name: {"toy": fingerprint(name, TOYS[name]), "versions": versions()} for name in names}
    jobs: list[tuple[str, str, Path, dict[str, Any]]] = []  # (name, step, transformers' folder, what vLLM runs)
    for name, record in records.items():
        toy = TOYS[name]
        dense = attempt(record, "build", lambda: dense_folder(name, toy, work))
        if dense is None:
            continue
        if not toy.not_served:
            jobs.append((name, "dense", dense, job(dense, toy)))
        found = None if dense_only else attempt(record, "compress", lambda: pruned_folders(name, toy, work))
        if found is not None:
            out, exported, record["compress"] = found
            if not toy.not_served:
                jobs.append((name, "served", exported, job(out, toy)))
                if is_loose(toy):
                    jobs.append((name, "exported", exported, job(exported, toy)))
    results = serve([given for *_, given in jobs], work / "vllm")
    served: dict[str, Any] = {}
    for (name, step, folder, _), result in zip(jobs, results, strict=True):
        if step == "served":
            served[name] = result
        if "error" in result:
            records[name][step] = {"error": result["error"][:1000]}
            continue
        found = attempt(records[name], step, partial(compare, step, result, served.get(name), folder, TOYS[name]))
        if found is not None:
            records[name][step] = found
    return records


def compare(step: str, result: Any, served: Any, folder: Path, toy: Toy) -> dict[str, Any] | None:
    """The agreement of a step's result with transformers on `folder`; of "exported" with what vLLM served pruned."""
    if step != "exported":
        return agreement(result, folder, toy)
    return None if "error" in served else agreement_of_two(result, served)


def versions() -> dict[str, str]:
    name_vllm()
    return {"transformers": version("transformers"), "vllm": version("vllm")}


def record_of(work: Path, name: str) -> Path:
    return work / f"{name}.json"


def has_run(work: Path, name: str) -> bool:
    """Whether an interrupted run has left a record of the toy as it is now, with the same versions."""
    path = record_of(work, name)
    record = json.loads(path.read_text()) if path.exists() else {}
    return record.get("toy") == fingerprint(name, TOYS[name]) and record.get("versions") == versions()


def keep_results(path: Path, records: dict[str, Any]) -> None:
    """Put the records into the results file, beside those of other types that it has."""
    known = json.loads(path.read_text())["types"] if path.exists() else {}
    types = dict(sorted((known | records).items()))
    path.write_text(json.dumps({"versions": versions(), "types": types}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--work", type=Path, default=Path(".work/zoo"))
    parser.add_argument("--dense", action="store_true")
    options = parser.parse_intermixed_args()
    options.work.mkdir(parents=True, exist_ok=True)
    names = options.names or list(TOYS)
    left = options.names or [name for name in names if not has_run(options.work, name)]
    for first in range(0, len(left), BATCH):
        for name, record in run_batch(left[first : first + BATCH], options.work, options.dense).items():
            record_of(options.work, name).write_text(json.dumps(record))
            shutil.rmtree(options.work / name, ignore_errors=True)
            print(name, json.dumps(record) if options.dense else problems(TOYS[name], record) or "good", flush=True)
    records = {name: json.loads(record_of(options.work, name).read_text()) for name in names}
    keep_results(options.results, records)
    shutil.rmtree(options.work)
    wrong = [name for name, record in records.items() if problems(TOYS[name], record)]
    print(
        f"{len(records)} types, {len(wrong)} not as promised: {', '.join(wrong)}" if wrong else f"{len(records)} types"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Run the zoo: `python -m zoo.run RESULTS.json [--work FOLDER] [--dense] [--again] [MODEL_TYPE ...]`.

Results are kept after each batch, so an interrupted run continues. `--dense` only asks whether vLLM and transformers
agree on the dense toys. `--again` forgets what is known of the named types.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.agreement import agreement, job
from zoo.family import dense_folder, pruned_folders
from zoo.serving import serve
from zoo.toys import TOYS

BATCH = 8  # toys for each process of vLLM, whose start takes as long as several of them


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
    records: dict[str, Any] = {name: {} for name in names}
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
    results = serve([given for *_, given in jobs], work / "vllm")
    for (name, step, folder, _), result in zip(jobs, results, strict=True):
        if "error" in result:
            records[name][step] = {"error": result["error"][:1000]}
            continue
        found = attempt(records[name], step, lambda: agreement(result, folder, TOYS[name]))
        if found is not None:
            records[name][step] = found
    return records


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--work", type=Path, default=Path(".work/zoo"))
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_intermixed_args()
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    names = [name for name in options.names or TOYS if options.again or name not in known]
    for first in range(0, len(names), BATCH):
        batch = names[first : first + BATCH]
        known |= run_batch(batch, options.work, options.dense)
        options.results.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        for name in batch:
            print(name, json.dumps(known[name]), flush=True)
            shutil.rmtree(options.work / name, ignore_errors=True)


if __name__ == "__main__":
    main()

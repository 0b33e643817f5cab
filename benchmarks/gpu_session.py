"""`python -m benchmarks.gpu_session STEP --out DIR`: all that a GPU is needed for, in half an hour.

The machine needs a checkout, the bundle that `pack` makes, and a Python with torch. Each step writes what it finds into
DIR, line by line; called again, it does what is missing and what failed. A step ends by itself within ten minutes.

The exit status is 0 if all is done and right, 1 if something failed, and 3 if time was too short.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_bundle, gpu_check, gpu_decode, gpu_measured, gpu_products, gpu_sanitizer, gpu_targets
from benchmarks.gpu_bundle import BUNDLE, ROOT
from benchmarks.gpu_check import Options, Part
from benchmarks.gpu_record import CUT, FAILED, Record, missing, run_missing
from benchmarks.gpu_report import Report
from benchmarks.gpu_timing import FORMATS, Row
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda.architectures import Architecture, find_architecture, for_capability
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.cuda.bindings import LIBRARY_FOLDER_VARIABLE

FOUND = ROOT / "gpu_session"  # not in .work, which `make clean` empties
TILES = ROOT / "serve" / "kernels" / "cuda" / "tiles.py"
SECONDS = {"check": 480, "times": 120, "decode": 330, "sanitize": 420}
UNFINISHED = 3
_FIRST_SHAPE, _FIRST_SECONDS = (128, 256), 150  # of which a cold disk may take most


def record_of(out: Path, step: str) -> Record:
    return Record(out / f"{step}.jsonl")


def check(out: Path, deadline: float) -> Record:
    """gpu_check in full: products, CUDA graphs, two streams, times, and the times of all tiles."""
    return _gpu_check(record_of(out, "check"), _all_parts, deadline, Report(out / "gpu_check.json"))


def times(out: Path, deadline: float) -> Record:
    """The times of gpu_check again, with the tiles that `fill` wrote into MEASURED."""
    return _gpu_check(record_of(out, "times"), _timing_parts, deadline, Report(out / "gpu_times.json"))


def _all_parts() -> list[Part]:
    return gpu_check.parts_of(Options())


def _timing_parts() -> list[Part]:
    return [part for part in _all_parts() if part.section in ("limits", "times")]


def _gpu_check(record: Record, factory: Callable[[], list[Part]], deadline: float, report: Report) -> Record:
    for part in factory():
        for section, row in record.best(part.name).rows if part.name in record.passed else ():
            report.add(section, row)
    run_missing(record, factory, deadline, report.add, gpu_check.supervise)
    report.replace(record.rows_by_section())
    report.conclude()
    return record


def sanitize(out: Path, deadline: float) -> Record:
    """The quick checks under memcheck, racecheck, synccheck and initcheck."""
    record = record_of(out, "sanitize")
    factory = partial(gpu_sanitizer.parts, BUNDLE, out / "sanitizer.log")
    if missing(factory, record.passed, record.failed):
        gpu_sanitizer.check_machine(BUNDLE)
    # Each of these parts is a process of its own already.
    run_missing(record, factory, deadline, _show, lambda factory, deadline: gpu_check.run_parts(factory(), deadline))
    return record


def decode(out: Path, deadline: float) -> Record:
    """A decoder layer and whole models, dense and sparse."""
    record = record_of(out, "decode")
    run_missing(record, gpu_decode.parts, deadline, _show, gpu_check.supervise)
    return record


STEPS: dict[str, Callable[[Path, float], Record]] = {
    "check": check,
    "times": times,
    "decode": decode,
    "sanitize": sanitize,
}


def _show(section: str, row: Row) -> None:
    if row.get("ok") is False:
        print(f"FAILED {row}", flush=True)
    elif section == "sanitizer":
        print(f"{row['tool']}, {row['group']}: {row['checks']} checks, no errors", flush=True)
    elif "us" in row:
        print(gpu_decode.line(row), flush=True)


def report(out: Path) -> None:
    """Print what all steps found so far, with the targets, and write it to session.json if it can.

    Raises:
        RiaError: there is no such folder.
    """
    if not out.is_dir():
        raise RiaError(f"{out} is not a folder")
    records = {step: record_of(out, step) for step in STEPS}
    judged = "times" if any("us" in row for row in records["times"].rows("times")) else "check"
    targets = gpu_targets.judge(records[judged].rows("times"), records["decode"].rows("decode"))
    found = {step: {"outcomes": record.outcomes, "rows": record.rows()} for step, record in records.items()}
    try:
        content = {"times_of": judged, "targets": targets, **found}
        (out / "session.json").write_text(json.dumps(content, indent=1))
    except OSError as error:
        print(f"session.json was not written: {error}")
    for step, record in records.items():
        ended = list(record.outcomes.values())
        print(f"{step}: {len(ended)} parts, {ended.count(FAILED)} failed, {ended.count(CUT)} cut short")
        for row in record.rows():
            if row.get("ok") is False or step not in ("check", "times"):
                _show("sanitizer" if "tool" in row else "", row)
    for row in records["check"].rows("concurrent"):
        outcome = row.get("error") or f"{row['wrong']} of {row['products']} products wrong at {row['tokens']} tokens"
        print(f"two streams at once, which is not supported: {outcome}")
    print(f"targets, with the times that `{judged}` found:")
    for row in targets:
        print(gpu_targets.line(row))


def fill(out: Path) -> None:
    """Write the fastest of the right tiles into MEASURED.

    Raises:
        RiaError: there is none.
    """
    rows, left_out = gpu_measured.trusted(record_of(out, "check"))
    for line in left_out:
        print(f"left out: {line}")
    if not rows:
        raise RiaError(f"{out} has no shape whose tiles are all timed, and right")
    candidates = gpu_measured.fill(TILES, gpu_measured.table_of(rows))
    print(f"wrote {TILES}; mend the comment above MEASURED")
    if candidates:
        print(f"remove the `candidate` mark of {', '.join(candidates)} in serve/kernels/cuda/architectures.py")


def reason_against_running() -> str | None:
    """Why no step can run here, or None. Checked first, because time on a GPU is short."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    target = for_capability(*torch.cuda.get_device_capability(0))
    if target is None:
        return "no kernels for this GPU"
    named = os.environ.setdefault(LIBRARY_FOLDER_VARIABLE, str(BUNDLE))
    failures = (row["error"] for row in gpu_check.check_library() if row.get("ok") is False)
    return gpu_bundle.reason_against(Path(named), target) or next(failures, None) or reason_against_products()


def first_products() -> list[Part]:
    """A small product of each kind that our library has for this GPU."""
    return [
        Part(f"first product {dtype}", "checks", partial(_first_product, dtype))
        for dtype, one in FORMATS.items()
        if gpu_check.reason_against_ours(torch.bfloat16, one, *_FIRST_SHAPE) is None
    ]


def _first_product(weights: torch.dtype) -> Iterator[Row]:
    layer = gpu_products.random_layer(*_FIRST_SHAPE, torch.bfloat16, weights)
    yield from gpu_products.check_kernel(CutlassKernel, layer, tokens=(16,))


def reason_against_products() -> str | None:
    """Why a first small product fails, for example because the driver is too old for the library, or None."""
    parts = first_products()
    for index, row in gpu_check.supervise(first_products, time.monotonic() + _FIRST_SECONDS):
        if row.get("ok") is False or "skipped" in row:
            reason = row.get("error") or row.get("skipped") or "wrong"
            return f"{parts[index].name}: {reason}"
    return None


def needs(target: Architecture) -> None:
    """Print what the machine with the GPU needs, what to run there and for how long, and whether it is this one."""
    for line in gpu_bundle.needs(BUNDLE, target):
        print(line)
    print("run:")
    for step in ("check", "fill", "times", "decode", "sanitize", "report"):
        print(f"         python3 -m benchmarks.gpu_session {step:9} {_ends_after(step)}")
    print(f"here:    {reason_against_running() or 'all is there'}")


def _ends_after(step: str) -> str:
    return f"ends by itself within {-(-(SECONDS[step] + 60) // 60)} minutes" if step in SECONDS else "ends at once"


def run(step: str, out: Path, seconds: float) -> int:
    """Run a step, and return its exit status."""
    deadline = time.monotonic() + seconds
    if reason := reason_against_running():
        print(f"FAILED {reason}")
        return 1
    record = STEPS[step](out, deadline)
    outcomes = list(record.outcomes.values())
    print(f"{step}: {outcomes.count(FAILED)} parts failed, {outcomes.count(CUT)} are to be continued")
    return 1 if FAILED in outcomes else UNFINISHED if CUT in outcomes else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Everything that a GPU is needed for, step by step.")
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, text in {
        "pack": "compile and collect what must travel to the GPU; needs nvcc, no GPU",
        "needs": "what the machine with the GPU must have, and what to run there; needs no GPU",
    }.items():
        steps.add_parser(name, help=text).add_argument("--arch", default="90a", help="of the GPU (%(default)s)")
    for name, text in {
        "check": "all kernels and tiles: right, and how fast",
        "fill": "write the fastest tiles into MEASURED; needs no GPU",
        "times": "the kernels' times again, with the tiles that were filled in",
        "decode": "a decoder layer and whole models, dense and sparse",
        "sanitize": "the kernels under compute-sanitizer",
        "report": "what all steps found so far, beside the targets; needs no GPU",
    }.items():
        step = steps.add_parser(name, help=text)
        step.add_argument("--out", type=Path, default=FOUND, help="folder for what is found (%(default)s)")
        if name in STEPS:
            step.add_argument("--earlier", type=Path, help="folder with what an earlier call found, to be continued")
            step.add_argument("--seconds", type=float, default=SECONDS[name], help="start nothing after (%(default)s)")
    parsed = parser.parse_args(arguments)
    if parsed.step in STEPS and parsed.earlier and not parsed.earlier.is_dir():
        parser.error(f"{parsed.earlier} is not a folder")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = parse_arguments(arguments)
    try:
        if options.step == "pack":
            gpu_bundle.pack(BUNDLE, find_architecture(options.arch))
            return 0
        if options.step == "needs":
            needs(find_architecture(options.arch))
            return 0
        if options.step in STEPS:
            options.out.mkdir(parents=True, exist_ok=True)
            _take_over(options.earlier, options.out)
            return run(options.step, options.out, options.seconds)
        (report if options.step == "report" else fill)(options.out)
        return 0
    except RiaError as error:
        print(f"FAILED {error}")
        return 1


def _take_over(earlier: Path | None, out: Path) -> None:
    for path in earlier.glob("*.jsonl") if earlier and earlier.resolve() != out.resolve() else ():
        target = out / path.name
        if not target.exists() or not target.stat().st_size:
            shutil.copyfile(path, target)  # not its mode, which may be read-only


if __name__ == "__main__":
    raise SystemExit(main())

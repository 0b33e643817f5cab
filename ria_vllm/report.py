"""Reading ria_report.json, which is untrusted and only informative."""

import math
from typing import Any

HELD_OUT = "held_out"  # see `ria_vllm.offline.run.held_out`
VERDICT = "verdict"  # key -> a line that is said at the end, and with which the card begins
MEASURED = "measured"  # see `ria_vllm.hub.facts`
VERDICT_KEYS = ("quality", "size", "speed", "advice")
# Of linears' outputs: training changes them.
_ERRORS = ("error_before", "error_after", "rounding_error")


def report_number(entry: Any, key: str) -> float | None:
    """A number of one linear's report entry; None if there is none, or none that is finite."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def report_linears(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Linear name -> its entry in a `ria_report.json`."""
    linears = report.get("linears")
    return {n: e for n, e in linears.items() if isinstance(e, dict)} if isinstance(linears, dict) else {}


def without_errors(report: dict[str, Any]) -> dict[str, Any]:
    """ria_report.json without what training the weights has changed: errors of the linears' outputs, losses, and what
    was measured. Of the verdict, size and expected speed stay true."""
    linears, said = report_linears(report).items(), report.get(VERDICT)
    verdict = {key: said[key] for key in ("size", "speed") if key in said} if isinstance(said, dict) else {}
    report = {key: value for key, value in report.items() if key not in (HELD_OUT, VERDICT, MEASURED, "budget")}
    kept = {name: {key: value for key, value in entry.items() if key not in _ERRORS} for name, entry in linears}
    return ({VERDICT: verdict} if verdict else {}) | report | {"linears": kept}

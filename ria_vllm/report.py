"""Reading ria_report.json, which is untrusted and only informative."""

import math
from typing import Any


def report_number(entry: Any, key: str) -> float | None:
    """A number of one linear's report entry; None if there is none. The report is untrusted and only informative."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def report_linears(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Linear name -> its entry in a `ria_report.json`, whether it lists them by name or in a list."""
    linears = report.get("linears", {})
    if isinstance(linears, list):
        linears = {e["name"]: e for e in linears if isinstance(e, dict) and isinstance(e.get("name"), str)}
    return {n: e for n, e in linears.items() if isinstance(e, dict)} if isinstance(linears, dict) else {}


def without_errors(report: dict[str, Any]) -> dict[str, Any]:
    """ria_report.json without the errors of the linears' outputs, which training their weights has changed."""
    linears = report.get("linears")
    if not isinstance(linears, dict):
        return report
    stale = ("error_before", "error_after", "rounding_error")
    kept = {
        name: {key: value for key, value in record.items() if key not in stale} if isinstance(record, dict) else record
        for name, record in linears.items()
    }
    return report | {"linears": kept}

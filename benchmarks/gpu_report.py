"""What gpu_check prints, and the JSON file that it writes."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_tiles, gpu_timing
from benchmarks.gpu_timing import DEVICE, Row


class Report:
    """Collects the rows, rewrites the JSON file every few seconds, and prints what is worth seeing at once."""

    def __init__(self, path: Path):
        self.path, self._written = path, 0.0
        self.content: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(DEVICE),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(DEVICE))),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "checks": [],
        }
        print("{gpu}, compute capability {capability}, torch {torch}".format_map(self.content), flush=True)

    def add(self, section: str, row: Row) -> None:
        """Store and print a row, unless it only names the current step of its part."""
        if "at" in row and "error" not in row:
            return
        if row.get("ok") is False:
            print(f"FAILED {row}", flush=True)
        if section == "times" and "us" in row:
            if not any("us" in before for before in self.rows("times")):
                print(gpu_timing.HEADER)
            print(gpu_timing.line(gpu_timing.with_limits(row, self.limits)), flush=True)
        self._store(section, row)
        if time.monotonic() > self._written + 2:
            self.save()

    def _store(self, section: str, row: Row) -> None:
        if section == "times" and "us" in row:
            row = gpu_timing.with_limits(row, self.limits)
        self.content.setdefault("checks" if "ok" in row or "skipped" in row else section, []).append(row)

    def replace(self, found: Iterable[tuple[str, Row]]) -> None:
        """Have these rows, each after its section, instead of those that were added."""
        self.content = {key: value for key, value in self.content.items() if not isinstance(value, list)} | {
            "checks": []
        }
        for section, row in sorted(found, key=lambda one: one[0] != "limits"):
            self._store(section, row)

    def rows(self, section: str) -> list[Row]:
        return self.content.get(section, [])

    @property
    def limits(self) -> Row:
        return next(iter(self.rows("limits")), {})

    @property
    def failed(self) -> int:
        return sum(row.get("ok") is False for row in self.rows("checks"))

    def save(self) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(self.content, indent=1, allow_nan=False))
        part.replace(self.path)
        self._written = time.monotonic()

    def conclude(self) -> None:
        """Print what needs the whole run, and write the JSON file a last time."""
        for section, line_of in (("packing", gpu_timing.packing_line), ("gather", gpu_timing.gather_line)):
            for row in self.rows(section):
                print(line_of(row))
        if tiles := gpu_tiles.right(self.rows("tiles"), self.rows("checks")):
            print(gpu_tiles.table_rows(tiles))
        checks = self.rows("checks")
        skipped = {f"{row.get('kernel') or row['part']}: {row['skipped']}" for row in checks if "skipped" in row}
        for reason in sorted(skipped):
            print(f"not run: {reason}")
        print(f"{sum('ok' in row for row in checks)} checks, {self.failed} failed")
        self.save()
        print(f"wrote {self.path}")

"""The peak memory of a compression, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# The peak is measured above what the process holds after a small model: libraries, their tables and thread buffers.
_PROBE = """
import json, sys, threading, time
from pathlib import Path
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.progress import Monitor
from ria_vllm.offline.recipe import Recipe

small, large, out, options = sys.argv[1:]
recipe = Recipe(**{name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(options).items()})
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
compress(small, Path(out + "-small"), recipe, Settings(), Monitor(shown=False))
base, peak = held(), [0]

def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
compress(large, Path(out), recipe, Settings(), Monitor(shown=False))
print(peak[0] - base, flush=True)
import os; os._exit(0)
"""


def peak_memory(small: Path, large: Path, out: Path, **options: Any) -> int:
    """Bytes that compressing `large` into `out` takes more than compressing `small`, with these options of `Recipe`."""
    arguments = [str(small), str(large), str(out), json.dumps(options)]
    done = subprocess.run([sys.executable, "-c", _PROBE, *arguments], check=True, capture_output=True, text=True)
    return int(done.stdout)

"""vLLM on many folders, in a process of its own that is started again if a model kills it.

Not in the process that runs transformers: vLLM changes classes of transformers as it builds a model from them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

GENERATE = Path(__file__).parents[1] / "serve/generate.py"
SECONDS_EACH = 300
Job = dict[str, Any]


def serve(jobs: list[Job], place: Path) -> list[Any]:
    """The results of `generate.py`, one for each job: a list for each prompt, or {"error": text}.

    A failure leaves a process unfit for the next model, so it gets a new one; and so does a model that failed in a
    process that others had used.
    """
    place.mkdir(parents=True, exist_ok=True)
    given, found, log = place / "jobs.json", place / "results.json", place / "log"
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    results: list[Any] = []
    while len(results) < len(jobs):
        left = jobs[len(results) :]
        given.write_text(json.dumps(left))
        found.unlink(missing_ok=True)
        with open(log, "w") as file:
            command = [sys.executable, str(GENERATE), str(given), str(found), "--stop"]
            try:
                status: int | str = subprocess.run(
                    command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=SECONDS_EACH * len(left)
                ).returncode
            except subprocess.TimeoutExpired:
                status = "too slow"
        new = json.loads(found.read_text()) if found.exists() else []
        failed = next((place for place, result in enumerate(new) if "error" in result), len(new))
        if failed == 0:
            new = new[:1] or [{"error": f"vLLM's process ended ({status}): {log.read_text()[-500:]}"}]
        else:
            new = new[:failed]
        results += new
    return results

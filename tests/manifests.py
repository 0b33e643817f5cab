"""The manifests of docs/serve.md, in which an image's entry point is `vllm serve`."""

import re
from pathlib import Path
from typing import Any

import yaml

PAGE = Path(__file__).parents[1] / "docs" / "serve.md"


def manifests() -> list[Any]:
    """Those for docker compose, KServe and Ray Serve, parsed."""
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)]


def serve_arguments(folder: Path, max_model_len: int) -> list[str]:
    """What the containers pass to `vllm serve`, for another folder and a smaller model."""
    instead = {"/models/OUT": str(folder), "4096": str(max_model_len)}
    (container,) = manifests()[1]["spec"]["predictor"]["containers"]
    assert instead.keys() <= set(container["args"])
    return [instead.get(argument, argument) for argument in container["args"]]

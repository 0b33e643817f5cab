"""Folders that `tiny.write` wrote, for tests of what is read before the weights."""

import json

from ria_vllm.serve.model.config import RiaConfig


def config_of(folder) -> RiaConfig:
    config = RiaConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    return config

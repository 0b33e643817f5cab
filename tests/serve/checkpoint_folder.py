"""Folders that `tiny.write` wrote, for tests of what is read before the weights."""

import json

from damage import rewrite
from safetensors.torch import load_file

from ria_vllm.checkpoint.weight_files import SINGLE_FILE
from ria_vllm.format import permutation
from ria_vllm.format.schema import DIGESTS, PERMUTATIONS_FILE
from ria_vllm.serve.model.config import RiaConfig


def config_of(folder) -> RiaConfig:
    config = RiaConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    return config


def rebind(folder):
    """Give a folder with changed permutations the digest of these."""
    stored = load_file(folder / PERMUTATIONS_FILE)
    digest = permutation.digest({name.removesuffix(".input_permutation"): p for name, p in stored.items()})
    rewrite(folder / SINGLE_FILE, lambda tensors: None, **{DIGESTS["permutations_digest"]: digest})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["permutations_digest"] = digest
    (folder / "config.json").write_text(json.dumps(config))
